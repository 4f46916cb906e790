"""Packing a weight for `nm_matmul`, and back.

Letters: K N as in `nm_matmul`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer

from pallas_kernels.backends import Implementation, choose_backend
from pallas_kernels.meshes import name_axes, run_on_mesh, vary_like
from pallas_kernels.nm_matmul.backends import PACK_BACKENDS
from pallas_kernels.nm_matmul.call import PackArrays, PackFacts
from pallas_kernels.nm_matmul.mask_check import check_nm_mask
from pallas_kernels.nm_matmul.packing import TILE, PackedNM, decompress

type PackAxis = Literal[0, 1, "both"]

_DTYPES = (jnp.bfloat16, jnp.float16)


def pack_nm(
    w: jax.Array,
    mask: jax.Array,
    *,
    axis: PackAxis = 0,
    implementation: Implementation | None = None,
) -> PackedNM:
    """Pack a 2:4 sparse weight for the sparse tensor cores of NVIDIA GPUs since Ampere.

    Pack once per optimizer step, after `w` or `mask` changed, and pass the result as
    `nm_matmul(..., packed=)` for every micro-batch. Kernels of either backend read the same words.

    A group with fewer than two kept entries is filled up with zeros. Kept zeros of either sign, and
    NaN, are kept as they are; what w holds where the mask is False has no effect.

    Args:
      w: bf16 or f16[..., K, N], K and N multiples of 64.
      mask: bool, shaped like w, at most two of every four consecutive True along each packed axis.
      axis: 0 packs along K for the forward product; 1 along N; "both", of a transposable mask, for
        forward and backward.
      implementation: "mosaic_sm90" or "triton", one kernel that reads w and mask once; "xla"; or
        None: a kernel where it was proven and is faster, else "xla". All return the same bits.

    Returns:
      PackedNM, for each packed axis K*N/2 values and K*N/8 bytes of metadata.

    Raises:
      ValueError: if shape, dtype or an option is not as above, or if the values of the mask are
        known while tracing and a group keeps too many; of a traced mask, the first two are kept.
      NotImplementedError: if a kernel is named that does not run on the device: "mosaic_sm90" runs
        on Hopper GPUs, "triton" on NVIDIA's since Ampere.

    Example:
      >>> w = jnp.ones((64, 128), jnp.bfloat16)
      >>> mask = jnp.arange(64)[:, None] % 4 < jnp.full(128, 2)
      >>> pack_nm(w, mask).along_k.values.shape
      (128, 32)
    """
    _check(w, mask, axis)
    facts = PackFacts(
        along_k=axis in (0, "both"),
        along_n=axis in (1, "both"),
        shape=w.shape[-2:],
        dtype=w.dtype.name,
    )
    if not isinstance(mask, Tracer):
        for packed_axis in [0] * facts.along_k + [1] * facts.along_n:
            check_nm_mask(mask, axis=packed_axis)

    def pack_layers(w, mask, *, whole):
        backend = choose_backend("pack_nm", PACK_BACKENDS, implementation, facts, whole=whole)

        def pack(arrays):
            return backend.run(arrays, facts)

        for _ in w.shape[:-2]:
            pack = jax.vmap(pack)
        return (vary_like(pack(PackArrays(w, mask)), w),)

    layers = name_axes(w.ndim - 2)
    (packed,) = run_on_mesh(
        pack_layers,
        (w, mask),
        (layers + "KN", layers + "KN"),
        (layers,),
        parts=dict.fromkeys(layers, 1),
    )
    return packed


def unpack_nm(packed: PackedNM) -> jax.Array:
    """Return the sparse weight that was packed: `jnp.where(mask, w, 0)`, exactly.

    Args:
      packed: PackedNM of weights [..., K, N].

    Returns:
      array[..., K, N].

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (64, 64), jnp.bfloat16)
      >>> mask = jnp.arange(64)[:, None] % 4 < jnp.full(64, 2)
      >>> bool((unpack_nm(pack_nm(w, mask)) == jnp.where(mask, w, 0)).all())
      True
    """

    def unpack(packed):
        if packed.along_n is not None:
            return decompress(packed.along_n)
        return decompress(packed.along_k).T

    for _ in packed.shape[:-2]:
        unpack = jax.vmap(unpack)
    return unpack(packed)


def _check(w: jax.Array, mask: jax.Array, axis: PackAxis) -> None:
    if axis not in (0, 1, "both"):
        raise ValueError(f"axis must be 0, 1 or 'both', got {axis!r}")
    if w.dtype not in _DTYPES:
        raise ValueError(f"w must be bfloat16 or float16, got {w.dtype=}")
    if w.ndim < 2 or w.shape[-2] % TILE or w.shape[-1] % TILE or 0 in w.shape:
        raise ValueError(f"w must be [..., K, N], K and N multiples of {TILE}, got {w.shape=}")
    if mask.shape != w.shape or mask.dtype != jnp.bool_:
        raise ValueError(f"mask must be bool{list(w.shape)}, got {mask.dtype}{list(mask.shape)}")
