"""Pruning in Triton: what runs.

Letters: R  rows of groups   C  entries behind the axis of the groups
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.nm_matmul import xla
from pallas_kernels.nm_matmul.call import PruneArrays, PruneFacts
from pallas_kernels.nm_matmul.mvue import GROUP
from pallas_kernels.nm_matmul.triton.tiles import find_prune_tile
from pallas_kernels.nm_matmul.triton.transforms import differentiate_as
from pallas_kernels.triton.batching import fold_vmap, repeat_shared
from pallas_kernels.triton.device import check_device
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.tile_tables import Tile

DTYPES = ("bfloat16", "float16", "float32")


def check_pruning(facts: PruneFacts) -> None:
    """Refuse what the kernel does not do.

    Raises:
      NotImplementedError: with the reason.
    """
    _find_tile(facts)


def tile_pruning(facts: PruneFacts) -> str:
    """Name the tile of a program, and whether tiles stand out; "" where the kernel cannot run."""
    try:
        tile, _ = _find_tile(facts)
    except NotImplementedError:
        return ""
    before, length, behind = facts.sizes
    stands_out = before * (length // GROUP) % tile.rows or behind % tile.columns
    return f"{tile}, ragged" if stands_out else str(tile)


def prune(arrays: PruneArrays, facts: PruneFacts) -> tuple[jax.Array, jax.Array]:
    """Prune with one elementwise kernel.

    Returns:
      tuple of pruned, shaped and typed like x, and mask, bool shaped like x.

    Raises:
      NotImplementedError: if the device or the call is not one that the kernel takes.

    Numerics:
      f32; every operation is rounded by itself, to nearest, division too; numbers below the normal
      ones are kept. These are the bits of `mvue.prune_drawn` where XLA fuses no product with a sum,
      as on a CPU at `xla_backend_optimization_level` 0. Its program for a GPU divides with
      div.full.f32 and rcp.approx.f32 and is otherwise rounded in the same way (PTX for an A100).
    """
    tile, capability = _find_tile(facts)
    _, _, behind = facts.sizes
    launched = functools.partial(_prune, exact=facts.exact, tile=tile, capability=capability)

    def run(x, bits):
        rows = bits.reshape(-1, behind), x.reshape(-1, GROUP, behind)
        return tuple(out.reshape(x.shape) for out in fold_vmap(launched)(*rows))

    def run_plainly(x, bits):
        return xla.prune(PruneArrays(x, bits), facts)

    return differentiate_as(run_plainly, run)(*arrays)


def _find_tile(facts: PruneFacts) -> tuple[Tile, tuple[int, int]]:
    capability = check_device()
    if facts.dtype not in DTYPES:
        raise NotImplementedError(f"the Triton kernel takes {DTYPES}, got {facts.dtype}")
    if 0 in facts.shape:
        raise NotImplementedError(
            f"the Triton kernel takes arrays that are not empty, got {facts.shape}"
        )
    itemsize, (_, _, behind) = jnp.dtype(facts.dtype).itemsize, facts.sizes
    return find_prune_tile(capability, itemsize, behind), capability


def _prune(
    bits: jax.Array, x: jax.Array, *, exact: bool, tile: Tile, capability: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Launch the kernel.

    Args:
      bits: uint32[R, C].
      x: float[R, 4, C].

    Returns:
      tuple of pruned, like x, and mask bool[R, 4, C].
    """
    # Imported where it is launched: kernels need the extra.
    from pallas_kernels.nm_matmul.triton import prune_kernel

    bits, x = repeat_shared((bits, x))
    rows, columns = bits.shape
    results = launch(
        prune_kernel.prune_mvue,
        {"x": x, "bits": bits},
        {
            "pruned": jax.ShapeDtypeStruct(x.shape, x.dtype),
            "kept": jax.ShapeDtypeStruct(x.shape, jnp.bool_),
        },
        {
            "R": rows,
            "C": columns,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "EXACT": exact,
        },
        programs=-(-rows // tile.rows) * -(-columns // tile.columns),
        tile=tile,
        capability=capability,
        # As XLA computes it op by op.
        fuses=False,
    )
    return results["pruned"], results["kept"]
