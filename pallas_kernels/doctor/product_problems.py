"""Problems that show whether kernels of products, of packing and of pruning are right.

Letters: M rows (tokens)   K contracted axis   N columns   I x J blocks of the weight.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_matmul import block_sparse_matmul
from pallas_kernels.block_sparse_matmul.call import BlockFacts
from pallas_kernels.doctor import oracles
from pallas_kernels.doctor.problem import Function, Maker, Problem, Tolerance, draw_blocks
from pallas_kernels.nm_matmul import nm_matmul, pack_nm, prune_mvue, unpack_nm
from pallas_kernels.nm_matmul.activations import GATED
from pallas_kernels.nm_matmul.call import NMFacts, PackFacts, PruneFacts
from pallas_kernels.nm_matmul.mvue import GROUP


def _make_nm(facts: NMFacts) -> Problem:
    out_columns = facts.columns // (2 if facts.activation in GATED else 1)
    shapes = ((facts.rows, facts.inner), (facts.inner, facts.columns), (facts.columns,))
    x, w, bias = oracles.make_normal(shapes, facts.dtype)
    w = (w * math.sqrt(2 / facts.inner)).astype(facts.dtype)
    # In bf16, so that every dtype sees the same values.
    (dy,) = oracles.make_normal(((facts.rows, out_columns),), jnp.bfloat16, seed=1)
    key = None if facts.grad_pruning == "none" else jax.random.key(7)
    inputs = (x, w, bias) if facts.has_bias else (x, w)
    rules: dict[str, Any] = {"activation": facts.activation, "grad_pruning": facts.grad_pruning}

    def call(implementation, directions):
        def apply(x, w, bias, mask):
            return nm_matmul(
                x,
                w,
                mask,
                transposable=facts.transposable,
                key=key,
                bias=bias,
                pattern=facts.pattern,
                implementation=implementation,
                **rules,
            )

        return _with_gradients(apply, dy, directions)

    def plain(inputs, mask):
        x, w, *bias = inputs
        bias = bias[0] if bias else None
        results = oracles.plain_nm_matmul(x, w, mask, bias, dy, key, **rules)
        return results[: 1 + len(inputs)]

    def hide(inputs, mask):
        x, w, *bias = inputs
        return (x, jnp.where(mask, w, jnp.nan), *bias)

    masks = oracles.make_nm_masks(
        (facts.inner, facts.columns), facts.pattern, transposable=facts.transposable
    )
    names = _product_names(facts.has_bias)
    # Behind an activation dz differs in its last bits, and a draw may then fall on another pair.
    drawn = facts.grad_pruning != "none" and facts.activation is not None
    return Problem(
        names,
        inputs,
        {name: jnp.asarray(mask) for name, mask in masks.items()},
        call,
        call("reference", tuple(names)),
        plain,
        hide,
        drawn=("dw",) if drawn else (),
    )


def _product_names(has_bias: bool) -> dict[str, tuple[str, ...]]:
    return {"forward": ("y",), "gradient": ("dx", "dw", "dbias")[: 3 if has_bias else 2]}


def _with_gradients(apply, dy, directions) -> Function:
    """Return y, or y, dx, dw and dbias, of apply(x, w, bias, mask)."""

    def run(inputs, mask):
        def forward(*inputs):
            x, w, *bias = inputs
            return apply(x, w, bias[0] if bias else None, mask)

        if "gradient" not in directions:
            return (forward(*inputs),)
        y, pull_back = jax.vjp(forward, *inputs)
        return y, *pull_back(dy.astype(y.dtype))

    return run


def _shrink_rows(facts: Any) -> Iterator[Any]:
    for rows in sorted({min(facts.rows, most) for most in (1024, 4096, facts.rows)}):
        yield dataclasses.replace(facts, rows=rows)


def _draw_nm_mask(facts: NMFacts, density: float) -> jax.Array:
    shape = (facts.inner, facts.columns)
    masks = oracles.make_nm_masks(shape, facts.pattern, transposable=facts.transposable)
    return jnp.asarray(masks["whole"])


def _make_pack(facts: PackFacts) -> Problem:
    (w,) = oracles.make_normal((facts.shape,), facts.dtype)
    axis: Any = "both" if facts.along_k and facts.along_n else (0 if facts.along_k else 1)

    def call(implementation, directions):
        def run(inputs, mask):
            (w,) = inputs
            packed = pack_nm(w, mask, axis=axis, implementation=implementation)
            return tuple(map(_bits, (*jax.tree.leaves(packed), unpack_nm(packed))))

        return run

    def reference(inputs, mask):
        (w,) = inputs
        w = w.astype(facts.dtype)
        packed = pack_nm(w, mask, axis=axis, implementation="xla")
        return tuple(map(_bits, (*jax.tree.leaves(packed), jnp.where(mask, w, 0))))

    def hide(inputs, mask):
        return (jnp.where(mask, inputs[0], jnp.nan),)

    along = (facts.shape, facts.shape[::-1])
    masks = oracles.make_nm_masks(along[not facts.along_k], (2, 4), transposable=axis == "both")
    if not facts.along_k:
        masks = {name: mask.T for name, mask in masks.items()}
    masks = {name: jnp.asarray(mask) for name, mask in masks.items()}
    packed = ("along_k",) * facts.along_k + ("along_n",) * facts.along_n
    leaves = (f"{name} {part}" for name in packed for part in ("values", "metadata"))
    names = {"forward": (*leaves, "unpacked")}
    return Problem(names, (w,), masks, call, reference, None, hide)


def _bits(x: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned)


def _make_prune(facts: PruneFacts) -> Problem:
    (x,) = oracles.make_normal((facts.shape,), facts.dtype)
    rng = np.random.default_rng(4)
    # Some groups of zeros, some entries that are zero or not finite, all scales of the dtype.
    factors = 2.0 ** rng.integers(-14, 15, facts.shape)
    factors *= rng.choice([1.0, 0.0, np.inf], facts.shape, p=[0.75, 0.24, 0.01])
    start = [slice(None)] * x.ndim
    start[facts.axis] = slice(GROUP)
    factors[tuple(start)] = 0.0
    wild = (x.astype(jnp.float32) * jnp.asarray(factors, jnp.float32)).astype(facts.dtype)

    def call(implementation, directions):
        def run(_, x):
            key = jax.random.key(9)
            return prune_mvue(
                x, key, axis=facts.axis, exact=facts.exact, implementation=implementation
            )

        return run

    names = {"forward": ("pruned", "mask")}
    # XLA divides on a GPU to within two units. With errors of that size in 8 million groups, kept
    # values were off by up to 13 units of f32, and one group in 1.3 million kept another pair.
    ulps, share = (0, 0.0) if facts.exact else (16 if facts.dtype == "float32" else 1, 1e-5)
    return Problem(
        names,
        (x,),
        {"ordinary": x, "wild": wild},
        call,
        call("xla", ("forward",)),
        None,
        tolerances={"pruned": Tolerance(ulps, share), "mask": Tolerance(0, share)},
    )


def _make_block(facts: BlockFacts) -> Problem:
    inner, columns = facts.shape
    x, w, bias = oracles.make_normal(((facts.rows, inner), (inner, columns), (columns,)))
    w = w * math.sqrt(2 / inner)
    x, w, bias = (array.astype(facts.dtype) for array in (x, w, bias))
    (dy,) = oracles.make_normal(((facts.rows, columns),), jnp.bfloat16, seed=1)
    inputs = (x, w, bias) if facts.has_bias else (x, w)

    def call(implementation, directions):
        def apply(x, w, bias, masks):
            mask, grad_mask = masks
            return block_sparse_matmul(
                x, w, mask, grad_mask=grad_mask, bias=bias, implementation=implementation
            )

        return _with_gradients(apply, dy, directions)

    def plain(inputs, masks):
        x, w, *bias = inputs
        bias = bias[0] if bias else jnp.zeros(columns, x.dtype)
        mask, grad_mask = masks
        results = oracles.plain_block_matmul(x, w, mask, grad_mask, bias, dy.astype(x.dtype))
        return results[: 1 + len(inputs)]

    def hide(inputs, masks):
        x, w, *bias = inputs
        mask, _ = masks
        kept = mask.repeat(inner // mask.shape[0], 0).repeat(columns // mask.shape[1], 1)
        return (x, jnp.where(kept, w, jnp.nan), *bias)

    drawn = oracles.make_masks(facts.grid)
    masks = {name: (mask, mask) for name, mask in drawn.items()}
    masks["gradient of everything"] = (drawn["random"], drawn["full"])
    names = _product_names(facts.has_bias)
    return Problem(names, inputs, masks, call, call("reference", tuple(names)), plain, hide)


def _draw_block_masks(facts: BlockFacts, density: float) -> tuple[jax.Array, jax.Array]:
    mask = draw_blocks(facts.grid, density)
    return mask, mask


def _dense_product(facts: BlockFacts) -> Function:
    (dy,) = oracles.make_normal(((facts.rows, facts.shape[1]),), jnp.bfloat16, seed=1)

    def apply(x, w, bias, mask):
        y = jnp.dot(x, w, preferred_element_type=jnp.float32)
        return (y if bias is None else y + bias).astype(x.dtype)

    return _with_gradients(apply, dy, ("forward", "gradient"))


def _keep(facts: Any) -> Iterator[Any]:
    yield facts


def _draw_pruned(facts: PruneFacts, density: float) -> jax.Array:
    return _make_prune(facts).inputs[0]


def _draw_pack_mask(facts: PackFacts, density: float) -> jax.Array:
    return _make_pack(facts).masks["whole"]


NM_MATMUL = Maker(NMFacts, _make_nm, _shrink_rows, _draw_nm_mask)
PRUNE_MVUE = Maker(PruneFacts, _make_prune, _keep, _draw_pruned)
PACK_NM = Maker(PackFacts, _make_pack, _keep, _draw_pack_mask)
BLOCK_SPARSE_MATMUL = Maker(
    BlockFacts, _make_block, _shrink_rows, _draw_block_masks, _dense_product
)
