"""The product of a layer with its weight: dense, by groups or by blocks, whole or in parts.

On a mesh each device multiplies its examples, positions and columns. The weight is cut over "fsdp"
and gathered for the product; its gradient comes back in the same parts.

Legend: B batch, T position, K contracted axis, N columns of the kernel, I x J its blocks.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from pallas_kernels import Implementation, block_sparse_matmul, draw_pruning_bits, nm_matmul
from pallas_kernels.nm_matmul.op import Activation, GradPruning
from sparsejax.patterns import NMPattern, WeightBlocks, WeightPattern
from sparsejax.sharding import (
    BATCH,
    constrain,
    deal_columns,
    fit_axis,
    gather_weight,
    get_sizes,
    map_parts,
)

type LayerActivation = Activation | Literal["gelu_exact", "relu"]
"""What may follow a layer."""

type Split = Literal["columns", "rows"]
"""What of a weight "tensor" cuts. Of columns, each device has its own results; of rows, its own
part of a sum."""

REMADE = ("gathered weight", "pruning bits")
"""Names of what the backward pass makes again rather than keep, see `jax.checkpoint_policies`."""

# What no kernel fuses with a product.
_UNFUSED = ("gelu_exact", "relu")
_GATES = {"geglu": nnx.gelu, "swiglu": nnx.silu}


class LinearOptions(NamedTuple):
    """Static choices of one training phase about layers with sparse weights.

    Attributes:
      sparse: bool, False ignores the masks and everything below.
      grad_pruning: "none"; or "mvue" or "mvue_exact", the gradient of a weight comes from two of
        every four tokens, drawn without bias.
      implementation: which kernel runs the product, None for the best on the device.
      tap: called while a linear layer of a block is traced, whether its weight is sparse or not,
        with its name and float[..., K], what it would read; returns what it reads. None = the same.
    """

    sparse: bool = True
    grad_pruning: GradPruning = "none"
    implementation: Implementation | None = None
    tap: Callable[[str, jax.Array], jax.Array] | None = None


SPARSE_LINEAR = LinearOptions()
DENSE_LINEAR = LinearOptions(sparse=False)


class Weight(NamedTuple):
    """What a layer multiplies by, in the type of the product.

    Attributes:
      kernel: float[K, N].
      bias: float[N], or None.
      mask: bool[K, N], or bool[I, J] of blocks; None of a dense layer.
      gradient_mask: bool[I, J], blocks whose gradient is computed; None but of blocks.
    """

    kernel: jax.Array
    bias: jax.Array | None = None
    mask: jax.Array | None = None
    gradient_mask: jax.Array | None = None


def multiply(
    x: jax.Array,
    weight: Weight,
    *,
    pattern: WeightPattern | None,
    options: LinearOptions,
    key: jax.Array | None = None,
    bits: jax.Array | None = None,
    activation: LayerActivation | None = None,
) -> jax.Array:
    """Multiply by a weight, and apply an activation.

    Args:
      x: float[..., K], typed like the weight.
      pattern: of the weight; None of a dense layer.
      options: LinearOptions, static.
      key: typed key; needed where the options prune gradients and no bits are given.
      bits: what `draw_pruning_bits` drew, instead of a key.
      activation: as of `SparseLinear`.

    Returns:
      float[..., N], or [..., N / 2] for a gated activation.

    Raises:
      ValueError: if a shape or option does not fit, or a key is missing.
    """
    kernel, bias, mask, gradient_mask = weight
    if pattern is None or mask is None or not options.sparse:
        y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        if bias is not None:
            y += jnp.reshape(bias, (1,) * (y.ndim - 1) + (-1,))
        return activate(y, activation)
    if isinstance(pattern, WeightBlocks):
        if options.grad_pruning != "none":
            raise ValueError(
                f"grad_pruning must be 'none' for weights in blocks, got {options.grad_pruning!r}"
            )
        y = block_sparse_matmul(
            x,
            kernel,
            mask,
            grad_mask=gradient_mask,
            bias=bias,
            implementation=options.implementation,
        )
        return activate(y, activation)
    n, m, transposable = get_groups(pattern)
    draws = options.grad_pruning != "none"
    y = nm_matmul(
        x,
        kernel,
        mask,
        transposable=transposable,
        grad_pruning=options.grad_pruning,
        key=key if draws and bits is None else None,
        bits=bits if draws else None,
        bias=bias,
        activation=None if activation in _UNFUSED else activation,
        pattern=(n, m),
        # The mask of a layer that is not pruned yet keeps everything.
        check_mask=False,
        implementation=options.implementation,
    )
    return activate(y, activation) if activation in _UNFUSED else y


def multiply_parts(
    x_BTK: jax.Array,
    weight: Weight,
    *,
    pattern: WeightPattern | None,
    options: LinearOptions,
    key: jax.Array | None = None,
    activation: LayerActivation | None = None,
    split: Split,
    segments: Sequence[int] = (),
) -> jax.Array:
    """Multiply by a weight on the mesh in force, each device its part.

    Args:
      x_BTK: float[B, T, K], typed like the weight.
      pattern: of the weight; None of a dense layer.
      options: LinearOptions, static.
      key: typed key; needed where the options prune gradients.
      activation: as of `SparseLinear`; None where rows are split.
      split: whether "tensor" cuts columns or rows of the kernel, if it divides them.
      segments: lengths of the columns that each device gets a share of, such as those of queries,
        keys and values; none = the columns as they are.

    Returns:
      float[B, T, N], or [B, T, N / 2] for a gated activation; columns as `deal_columns` orders
      them.
    """
    parts = _count_parts(weight, split)
    tensor = "tensor" if parts > 1 else None
    axes = (None, tensor) if split == "columns" else (tensor, None)
    gathered = 0 if split == "columns" else 1
    bits = None
    if key is not None and options.sparse and options.grad_pruning != "none":
        bits = draw_pruning_bits(key, x_BTK.shape, weight.kernel.shape[1])
    summed = split == "rows" and parts > 1
    added, weight = weight.bias, weight._replace(bias=None) if summed else weight
    if split == "columns" and segments:
        deal = functools.partial(_deal, segments, parts, weight.kernel.shape[1])
        weight = jax.tree.map(deal, weight)
        if bits is not None:
            # Drawn and dealt on each device, so that nothing as large as activations moves.
            whole = (BATCH, "context", None)
            bits = constrain(deal(constrain(bits, *whole)), *whole)

    def place(x):
        if x.ndim == 1:
            return P(axes[1])
        fsdp = fit_axis("fsdp", x.shape[gathered])
        return P(fsdp, axes[1]) if split == "columns" else P(axes[0], fsdp)

    def gather(x, spec):
        if len(spec) == 2 and spec[gathered] is not None:
            x = gather_weight(x, gathered)
        return checkpoint_name(x, REMADE[0])

    specs = jax.tree.map(place, weight)

    def run(x, weight, bits):
        y = multiply(
            x,
            jax.tree.map(gather, weight, specs),
            pattern=pattern,
            options=options,
            bits=None if bits is None else checkpoint_name(bits, REMADE[1]),
            activation=activation,
        )
        return jax.lax.psum(y, "tensor") if summed else y

    out = P(BATCH, "context", axes[1])
    y = map_parts(run, (P(BATCH, "context", axes[0]), specs, out), out)(x_BTK, weight, bits)
    return y + added if summed and added is not None else y


def _count_parts(weight: Weight, split: Split) -> int:
    """Return how many parts "tensor" cuts a weight into: 1 if it does not divide it."""
    parts, axis = get_sizes()["tensor"], 1 if split == "columns" else 0
    lengths = [x.shape[axis] for x in weight if x is not None and x.ndim == 2]
    return parts if all(length % parts == 0 for length in lengths) else 1


def _deal(segments, parts, columns, x):
    # Of a mask of blocks the columns are those of blocks.
    unit = columns // x.shape[-1]
    return deal_columns(x, [length // unit for length in segments], parts)


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


def get_groups(pattern: WeightPattern) -> tuple[int, int, bool]:
    """Return n, m and whether groups run along both axes; without structure, groups of one.

    Args:
      pattern: of a weight, not in blocks.
    """
    if isinstance(pattern, NMPattern):
        return pattern.n, pattern.m, pattern.transposable
    return 1, 1, False
