"""A linear layer that ignores the weights its mask prunes, in place of `nnx.Linear`.

Legend: K contracted axis, N columns of the kernel, I x J its blocks.
"""

import zlib
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from pallas_kernels import Implementation, block_sparse_matmul, nm_matmul
from pallas_kernels.nm_matmul.op import Activation, GradPruning
from sparsejax.models.variables import SparsityMask
from sparsejax.patterns import NMPattern, WeightBlocks, WeightPattern

type LayerActivation = Activation | Literal["gelu_exact", "relu"]
"""What may follow a layer."""

# What no kernel fuses with a product.
_UNFUSED = ("gelu_exact", "relu")


class LinearOptions(NamedTuple):
    """Static choices of one training phase about layers with sparse weights.

    Attributes:
      sparse: bool, False ignores the masks and everything below.
      grad_pruning: "none"; or "mvue" or "mvue_exact", the gradient of a weight comes from two of
        every four tokens, drawn without bias.
      implementation: which kernel runs the product, None for the best on the device.
    """

    sparse: bool = True
    grad_pruning: GradPruning = "none"
    implementation: Implementation | None = None


SPARSE_LINEAR = LinearOptions()
DENSE_LINEAR = LinearOptions(sparse=False)
_TWO_OF_FOUR = NMPattern(2, 4)
_GATES = {"geglu": nnx.gelu, "swiglu": nnx.silu}
_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()


class SparseLinear(nnx.Module):
    """Linear layer with a mask on its kernel, trained straight-through.

    y = act(x (kernel * mask) + bias);  the gradient of the kernel is dense, that of x is masked

    Layers that nothing has pruned yet are dense, for masks keep everything at first. Assign to
    `kernel_mask`, outside a trace, to prune.

    Attributes:
      kernel: nnx.Param f32[K, N], all weights, pruned ones too.
      bias: nnx.Param f32[N], or None.
      kernel_mask: SparsityMask, True = kept: bool[K, N], or bool[I, J] of blocks.
      gradient_mask: SparsityMask bool[I, J], the blocks whose gradient is computed; others get 0.
        Of blocks only.

    Example:
      >>> layer = SparseLinear(8, 3, rngs=nnx.Rngs(0))
      >>> layer.kernel_mask[...] = jnp.arange(8)[:, None] % 4 < jnp.full(3, 2)
      >>> layer(jnp.ones((5, 8))).shape
      (5, 3)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        pattern: WeightPattern = _TWO_OF_FOUR,
        dtype=None,
        kernel_init=_KERNEL_INIT,
        bias_init=_BIAS_INIT,
        rngs: nnx.Rngs,
    ):
        """Create the parameters, those of an `nnx.Linear` with these `rngs`, and a full mask.

        Args:
          in_features: int, K; a multiple of m of an NMPattern.
          out_features: int, N; a multiple of m if the pattern is transposable.
          use_bias: bool, add a bias.
          pattern: NMPattern, Unstructured or WeightBlocks, what masks are to follow.
          dtype: type of the product, None for that of input and parameters together; parameters
            are float32.
          kernel_init: initializer of the kernel.
          bias_init: initializer of the bias.
          rngs: nnx.Rngs with a `params` stream.

        Raises:
          ValueError: if the groups or blocks of the pattern do not fill an axis.
        """
        _, m, transposable = _get_groups(pattern)
        sizes = {"in_features": in_features}
        if transposable:
            sizes["out_features"] = out_features
        for name, size in sizes.items():
            if size % m:
                raise ValueError(
                    f"{name} must be a multiple of {m} for the pattern '{pattern}', got {size}"
                )
        self.in_features, self.out_features = in_features, out_features
        self.pattern, self.dtype = pattern, dtype
        shape = (in_features, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, jnp.float32))
        self.bias: nnx.Param[jax.Array] | None
        if use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), jnp.float32))
        else:
            self.bias = nnx.data(None)
        self._multiply = _multiply_groups
        if isinstance(pattern, WeightBlocks):
            self._multiply = _multiply_blocks
            shape = pattern.grid(shape)
            self.gradient_mask = SparsityMask(jnp.ones(shape, bool))
        self.kernel_mask = SparsityMask(jnp.ones(shape, bool))

    def __call__(
        self,
        x: jax.Array,
        *,
        options: LinearOptions = SPARSE_LINEAR,
        key: jax.Array | None = None,
        activation: LayerActivation | None = None,
    ) -> jax.Array:
        """Apply the layer and an activation.

        Args:
          x: float[..., K].
          options: LinearOptions, static.
          key: typed key; needed where the options prune gradients, without effect elsewhere.
          activation: None; "gelu" (tanh form); "gelu_exact" and "relu", which no kernel fuses; or
            "geglu", "swiglu": the first half of the columns is multiplied with the activated second
            half.

        Returns:
          float[..., N], or [..., N / 2] for a gated activation.

        Raises:
          ValueError: if a shape or option is not as described, or a key is missing.
          NotImplementedError: if the options name a kernel that does not run here.

        Numerics:
          With dense options, those of `nnx.Linear` and then `activate`, bit for bit; otherwise
          those of `pallas_kernels.nm_matmul`, or of `block_sparse_matmul`.
        """
        kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...]
        x, kernel, bias = promote_dtype((x, kernel, bias), dtype=self.dtype)
        if not options.sparse:
            y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
            if bias is not None:
                y += jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))
            return activate(y, activation)
        return self._multiply(self, x, kernel, bias, options, key, activation)


def _multiply_blocks(layer, x, kernel, bias, options, key, activation):
    del key
    if options.grad_pruning != "none":
        raise ValueError(
            f"grad_pruning must be 'none' for weights in blocks, got {options.grad_pruning!r}"
        )
    y = block_sparse_matmul(
        x,
        kernel,
        layer.kernel_mask[...],
        grad_mask=layer.gradient_mask[...],
        bias=bias,
        implementation=options.implementation,
    )
    return activate(y, activation)


def _multiply_groups(layer, x, kernel, bias, options, key, activation):
    n, m, transposable = _get_groups(layer.pattern)
    y = nm_matmul(
        x,
        kernel,
        layer.kernel_mask[...],
        transposable=transposable,
        grad_pruning=options.grad_pruning,
        key=None if options.grad_pruning == "none" else key,
        bias=bias,
        activation=None if activation in _UNFUSED else activation,
        pattern=(n, m),
        # The mask of a layer that is not pruned yet keeps everything.
        check_mask=False,
        implementation=options.implementation,
    )
    return activate(y, activation) if activation in _UNFUSED else y


def activate(z: jax.Array, activation: LayerActivation | None) -> jax.Array:
    """Apply the activation of a feed-forward layer.

    None: z,  "gelu" and "gelu_exact": gelu(z),  "relu": max(z, 0),
    "geglu": value * gelu(gate),  "swiglu": value * silu(gate)

    Args:
      z: float[..., N]; N is even for a gated activation, the first half is the value.
      activation: None, "gelu" (tanh form), "gelu_exact" (error function), "relu", "geglu" (tanh
        form) or "swiglu".

    Returns:
      float[..., N], or [..., N / 2] if gated, typed like z, in whose type it is computed.

    Raises:
      ValueError: if the activation is unknown, or N odd for a gated one.

    References:
      Shazeer, arXiv:2002.05202.
    """
    if activation is None:
        return z
    if activation == "gelu":
        return nnx.gelu(z)
    if activation == "gelu_exact":
        return nnx.gelu(z, approximate=False)
    if activation == "relu":
        return nnx.relu(z)
    if activation not in _GATES:
        raise ValueError(
            "activation must be None, 'gelu', 'gelu_exact', 'relu', 'geglu' or 'swiglu', got "
            f"{activation!r}"
        )
    if z.shape[-1] % 2:
        raise ValueError(f"{activation=} needs an even number of columns, got {z.shape=}")
    value, gate = jnp.split(z, 2, axis=-1)
    return value * _GATES[activation](gate)


def _get_groups(pattern: WeightPattern) -> tuple[int, int, bool]:
    """Return n, m and whether groups run along both axes; without structure, groups of one."""
    if isinstance(pattern, NMPattern):
        return pattern.n, pattern.m, pattern.transposable
    return 1, 1, False


def make_linear(
    in_features: int, out_features: int, *, pattern: WeightPattern | None, **options
) -> nnx.Linear | SparseLinear:
    """Create the linear layer of a weight that may be sparse.

    Args:
      pattern: WeightPattern of a sparse weight, None for `nnx.Linear`.
      **options: what both take.

    Returns:
      SparseLinear or nnx.Linear, with equal parameters.
    """
    if pattern is None:
        return nnx.Linear(in_features, out_features, **options)
    return SparseLinear(in_features, out_features, pattern=pattern, **options)


def apply_linear(
    layer: nnx.Linear | SparseLinear,
    x: jax.Array,
    *,
    name: str,
    options: LinearOptions,
    pruning_key: jax.Array | None,
    activation: LayerActivation | None = None,
) -> jax.Array:
    """Apply a linear layer of a block, of either kind, and an activation.

    Args:
      x: float[..., K].
      name: str, of the layer in its block; layers of other names draw other numbers.
      options: LinearOptions, static.
      pruning_key: typed key of the block, or None where no gradient is pruned.
      activation: as of `SparseLinear`.

    Returns:
      float[..., N], or [..., N / 2] for a gated activation.
    """
    if not isinstance(layer, SparseLinear):
        return activate(layer(x), activation)
    key = None
    if pruning_key is not None:
        key = jax.random.fold_in(pruning_key, zlib.crc32(name.encode()))
    return layer(x, options=options, key=key, activation=activation)
