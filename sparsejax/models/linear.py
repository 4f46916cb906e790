"""A linear layer that ignores the weights its mask prunes, in place of `nnx.Linear`.

Legend: K contracted axis, N columns of the kernel, I x J its blocks.
"""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from sparsejax.models.products import (
    SPARSE_LINEAR,
    LayerActivation,
    LinearOptions,
    Split,
    Weight,
    activate,
    get_groups,
    multiply,
    multiply_parts,
)
from sparsejax.models.variables import SparsityMask
from sparsejax.patterns import NMPattern, WeightBlocks, WeightPattern
from sparsejax.sharding import deal_columns, get_sizes, is_mapped

_TWO_OF_FOUR = NMPattern(2, 4)
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
        _, m, transposable = get_groups(pattern)
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
        if isinstance(pattern, WeightBlocks):
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
        x, weight = read_weight(self, x)
        return multiply(
            x, weight, pattern=self.pattern, options=options, key=key, activation=activation
        )


def read_weight(layer: nnx.Linear | SparseLinear, x: jax.Array) -> tuple[jax.Array, Weight]:
    """Read what a layer multiplies by, in one type with its input.

    Args:
      layer: of either kind.
      x: float[..., K].

    Returns:
      x and Weight.
    """
    kernel, bias = layer.kernel[...], None if layer.bias is None else layer.bias[...]
    x, kernel, bias = promote_dtype((x, kernel, bias), dtype=layer.dtype)
    if not isinstance(layer, SparseLinear):
        return x, Weight(kernel, bias)
    gradient_mask = None
    if isinstance(layer.pattern, WeightBlocks):
        gradient_mask = layer.gradient_mask[...]
    return x, Weight(kernel, bias, layer.kernel_mask[...], gradient_mask)


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
    split: Split,
    segments: Sequence[int] = (),
) -> jax.Array:
    """Apply a linear layer of a block, of either kind, and an activation.

    On a mesh each device computes its part, see `multiply_parts`.

    Args:
      x: float[..., K].
      name: str, of the layer in its block; layers of other names draw other numbers.
      options: LinearOptions, static.
      pruning_key: typed key of the block, or None where no gradient is pruned.
      activation: as of `SparseLinear`.
      split: what of the kernel is cut over "tensor".
      segments: of the columns, as of `multiply_parts`.

    Returns:
      float[..., N], or [..., N / 2] for a gated activation; on a mesh its columns are dealt.
    """
    if options.tap is not None:
        x = options.tap(name, x)
    key = None
    if pruning_key is not None and isinstance(layer, SparseLinear):
        key = jax.random.fold_in(pruning_key, zlib.crc32(name.encode()))
    if is_mapped() and type(layer).__call__ in (nnx.Linear.__call__, SparseLinear.__call__):
        pattern = layer.pattern if isinstance(layer, SparseLinear) else None
        x, weight = read_weight(layer, x)
        return multiply_parts(
            x,
            weight,
            pattern=pattern,
            options=options,
            key=key,
            activation=activation,
            split=split,
            segments=segments,
        )
    # Layers that do something of their own are called as they are, and XLA divides them.
    if isinstance(layer, SparseLinear):
        y = layer(x, options=options, key=key, activation=activation)
    else:
        y = activate(layer(x), activation)
    # The halves of a gated activation are no longer there to be dealt.
    return y if activation else deal_columns(y, segments, get_sizes()["tensor"])
