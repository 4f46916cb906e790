"""Every public op on every backend that runs on a CPU, interpreted where it has to be."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    block_sparse_attention,
    block_sparse_matmul,
    list_backends,
    make_block_schedule,
    mean_attention_map,
    nm_matmul,
    pack_nm,
    prune_mvue,
    transposable_mask,
    unpack_nm,
)
from pallas_kernels.doctor.oracles import make_nm_masks

_BLOCK, _LENGTH, _DIM = 32, 64, 32


def _normal(*shape, dtype):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def _sum_squares(y):
    return (y.astype(jnp.float32) ** 2).sum()


def _attention(implementation, dtype):
    q, k, v = (_normal(1, _LENGTH, heads, _DIM, dtype=dtype) for heads in (2, 1, 1))
    mask = np.array([[True, False], [False, False]])[None, None]
    segments = np.arange(_LENGTH, dtype=np.int32)[None] // 40
    kv_mask = np.arange(_LENGTH)[None] > 3

    def attend(x, mask, rule, **options):
        out, lse = block_sparse_attention(
            *x, mask, block_q=_BLOCK, block_kv=_BLOCK, return_lse=True, pruned_logits=rule,
            implementation=implementation, **options,
        )  # fmt: skip
        return _sum_squares(out) + jnp.where(lse > -jnp.inf, lse, 0).sum(), (out, lse)

    def run(x, mask, segments, kv_mask):
        gradient = jax.grad(attend, has_aux=True)
        # Kernels take minutes to interpret: for them fewer calls.
        results = [gradient(x, make_block_schedule(mask), "zero", causal=True)]
        if implementation not in ("triton", "mosaic_sm90"):
            results.append(gradient(x, mask, "masked", kv_mask=kv_mask))
            results.append(gradient(x, mask, "zero", segment_ids=segments))
            results.append(gradient(x, None, "masked"))
        return results

    return run, ((q, k, v), mask, segments, kv_mask)


def _block_matmul(implementation, dtype):
    x, w, bias = (_normal(*shape, dtype=dtype) for shape in ((16, 64), (64, 128), (128,)))
    mask = np.array([[True, False]])

    def multiply(x, mask):
        x, w, bias = x
        y = block_sparse_matmul(
            x, w, mask, bias=bias, grad_mask=~mask, implementation=implementation
        )
        return _sum_squares(y), y

    return jax.grad(multiply, has_aux=True), ((x, w, bias), mask)


def _nm_matmul(implementation, dtype):
    x, w, bias = (_normal(*shape, dtype=dtype) for shape in ((16, 64), (64, 128), (128,)))
    mask = make_nm_masks((64, 128), (2, 4), transposable=True)["underfull"]

    def multiply(x, mask, key):
        x, w, bias = x
        y = nm_matmul(
            x, w, mask, bias=bias, transposable=True, activation="swiglu", grad_pruning="mvue",
            key=key, implementation=implementation,
        )  # fmt: skip
        return _sum_squares(y), y

    return jax.grad(multiply, has_aux=True), ((x, w, bias), mask, np.uint32(0))


def _map(implementation, dtype):
    q, k = (_normal(2, 128, heads, _DIM, dtype=dtype) for heads in (2, 1))
    kv_mask = np.arange(128)[None] > np.array([[-1], [3]])

    def run(q, k, kv_mask):
        return mean_attention_map(
            q, k, causal=True, kv_mask_BS=kv_mask, implementation=implementation
        )

    return run, (q, k, kv_mask)


def _pack(implementation, dtype):
    mask = make_nm_masks((64, 64), (2, 4), transposable=True)["whole"]

    def run(w, mask):
        packed = pack_nm(w, mask, axis="both", implementation=implementation)
        return packed, unpack_nm(packed)

    return run, (_normal(64, 64, dtype=dtype), mask)


def _prune(implementation, dtype):
    def run(x, key):
        return [
            prune_mvue(x, key, axis=0, exact=exact, implementation=implementation)
            for exact in (False, True)
        ]

    return run, (_normal(64, 64, dtype=dtype), np.uint32(0))


def _transposable(implementation, dtype):
    def run(w):
        return transposable_mask(w, implementation=implementation)

    return run, (_normal(2, 8, 12, dtype=dtype),)


_OPS = {
    "block_sparse_attention": _attention,
    "block_sparse_matmul": _block_matmul,
    "mean_attention_map": _map,
    "nm_matmul": _nm_matmul,
    "pack_nm": _pack,
    "prune_mvue": _prune,
    "transposable_mask": _transposable,
}
CALLS = [(op, backend) for op in _OPS for backend in list_backends(op)]
"""Pairs of op and backend."""


def make_call(op, implementation):
    """Return a function of arrays, and the arrays on the device.

    Random keys are made inside, of a seed.

    Args:
      op: name of the op.
      implementation: name of the backend.
    """
    narrow = (
        implementation == "mosaic_sm90"
        or op == "pack_nm"
        or (op, implementation) == ("nm_matmul", "triton")
    )
    run, arrays = _OPS[op](implementation, jnp.bfloat16 if narrow else jnp.float32)

    def call(*arrays):
        return run(*(_make_key(x) for x in arrays))

    return call, jax.device_put(arrays)


def _make_key(x):
    is_seed = isinstance(x, jax.Array) and x.dtype == jnp.uint32
    return jax.random.key(x) if is_seed else x
