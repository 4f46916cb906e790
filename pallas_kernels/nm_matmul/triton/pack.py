"""Packing in Triton: what runs.

Letters: K N as in `nm_matmul`; B  weights.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.nm_matmul import xla
from pallas_kernels.nm_matmul.call import PackArrays, PackFacts
from pallas_kernels.nm_matmul.packing import TILE, Compressed, PackedNM
from pallas_kernels.nm_matmul.triton.tiles import find_pack_tile
from pallas_kernels.nm_matmul.triton.transforms import differentiate_as
from pallas_kernels.triton.batching import fold_vmap, repeat_shared
from pallas_kernels.triton.device import check_device
from pallas_kernels.triton.launch import launch

_WORDS = 2 * TILE  # of 32 bits for each tile of the metadata


def check_packing(facts: PackFacts) -> None:
    """Refuse to pack where the kernel cannot run.

    Raises:
      NotImplementedError: with the reason.
    """
    del facts
    check_device()


def tile_packing(facts: PackFacts) -> str:
    """Name the tile of a program; "" where the kernel cannot run."""
    del facts
    try:
        return str(find_pack_tile(check_device()))
    except NotImplementedError:
        return ""


def pack_weight(arrays: PackArrays, facts: PackFacts) -> PackedNM:
    """Pack a weight with one kernel that reads it and its mask once.

    Raises:
      NotImplementedError: if the device is not one that the kernel takes.
    """
    capability = check_device()

    def pack(w, mask):
        # Values are moved and not computed with, so that every NaN keeps its bits.
        bits = jax.lax.bitcast_convert_type(w, jnp.uint16)
        batched = fold_vmap(functools.partial(_pack, facts=facts, capability=capability))
        outs = jax.tree.map(lambda x: x[0], batched(bits[None], mask[None]))
        return PackedNM(*(_as_compressed(out, w.dtype) for out in outs))

    def pack_plainly(w, mask):
        return xla.pack_weight(PackArrays(w, mask), facts)

    return differentiate_as(pack_plainly, pack)(*arrays)


def _pack(
    w: jax.Array, mask: jax.Array, *, facts: PackFacts, capability: tuple[int, int]
) -> tuple[tuple[jax.Array, jax.Array] | None, tuple[jax.Array, jax.Array] | None]:
    """Launch the kernel.

    Args:
      w: uint16[B, K, N].
      mask: bool[B, K, N].

    Returns:
      tuple of values uint16[B, R, C / 2] and metadata uint32[B, R / 64, C / 64, 128] along K, and
      of both along N; None where not asked for.
    """
    # Imported where it is launched: kernels need the extra.
    from pallas_kernels.nm_matmul.triton import pack_kernel

    w, mask = repeat_shared((w, mask))
    tile = find_pack_tile(capability)
    weights, rows, columns = w.shape
    asked = (("k", columns, rows, facts.along_k), ("n", rows, columns, facts.along_n))
    outputs = {}
    for name, lines, contraction, is_asked in asked:
        values = jax.ShapeDtypeStruct((weights, lines, contraction // 2), jnp.uint16)
        words = (weights, lines // TILE, contraction // TILE, _WORDS)
        metadata = jax.ShapeDtypeStruct(words, jnp.uint32)
        outputs[f"values_{name}"] = values if is_asked else None
        outputs[f"metadata_{name}"] = metadata if is_asked else None
    results = launch(
        pack_kernel.pack_nm,
        {"w": w, "mask": mask},
        outputs,
        {
            "K": rows,
            "N": columns,
            "TILE": TILE,
            "ALONG_K": facts.along_k,
            "ALONG_N": facts.along_n,
        },
        programs=weights * (rows // tile.rows) * (columns // tile.columns),
        tile=tile,
        capability=capability,
    )
    along_k, along_n = (
        (results[f"values_{name}"], results[f"metadata_{name}"]) if is_asked else None
        for name, *_, is_asked in asked
    )
    return along_k, along_n


def prune_and_pack(dz: jax.Array, bits: jax.Array, *, exact: bool) -> Compressed:
    """Prune a gradient to two of every four tokens, without bias, and pack it, in one pass.

    Args:
      dz: bf16 or f16[M, N], M and N multiples of 64.
      bits: uint32[M/4, N], random, as `mvue.draw_bits` draws them.
      exact: bool, whether the variance is the least possible.

    Returns:
      Compressed [N, M], of the values that `mvue.prune_drawn` keeps; see `prune.prune` of their
      rounding.

    Raises:
      NotImplementedError: if the device is not one that the kernel takes.
    """
    launched = functools.partial(_prune_and_pack, exact=exact, capability=check_device())
    return Compressed(*jax.tree.map(lambda x: x[0], fold_vmap(launched)(dz[None], bits[None])))


def _prune_and_pack(
    dz: jax.Array, bits: jax.Array, *, exact: bool, capability: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    from pallas_kernels.nm_matmul.triton import pack_kernel

    dz, bits = repeat_shared((dz, bits))
    tile = find_pack_tile(capability)
    examples, rows, columns = dz.shape
    words = (examples, columns // TILE, rows // TILE, _WORDS)
    results = launch(
        pack_kernel.prune_and_pack,
        {"x": dz, "bits": bits},
        {
            "values": jax.ShapeDtypeStruct((examples, columns, rows // 2), dz.dtype),
            "metadata": jax.ShapeDtypeStruct(words, jnp.uint32),
        },
        {"M": rows, "N": columns, "TILE": TILE, "EXACT": exact},
        programs=examples * (rows // tile.rows) * (columns // tile.columns),
        tile=tile,
        capability=capability,
        # As XLA computes it op by op.
        fuses=False,
    )
    return results["values"], results["metadata"]


def _as_compressed(out, dtype):
    if out is None:
        return None
    values, metadata = out
    return Compressed(jax.lax.bitcast_convert_type(values, dtype), metadata)
