"""The search in Triton: what runs, and its launch.

Letters: K N as in `transposable_mask`.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.transposable_mask.call import TILE, TransposableArrays, TransposableFacts
from pallas_kernels.transposable_mask.magnitudes import find_most
from pallas_kernels.transposable_mask.triton.tiles import find_tile
from pallas_kernels.triton.batching import fold_vmap
from pallas_kernels.triton.device import check_device
from pallas_kernels.triton.launch import launch
from pallas_kernels.triton.tile_tables import Tile

DTYPES = ("bfloat16", "float16", "float32")


def check(facts: TransposableFacts) -> None:
    """Refuse what the kernel does not do.

    Raises:
      NotImplementedError: with the reason.
    """
    check_device()
    if facts.dtype not in DTYPES:
        raise NotImplementedError(f"the Triton kernel takes {DTYPES}, got {facts.dtype}")
    # The last program counts beyond the last tile.
    if facts.num_tiles > 2**31 - 2**16:
        raise NotImplementedError(
            "the Triton kernel counts tiles of 4 x 4 in 32 bits, got "
            f"{facts.rows} x {facts.columns} weights"
        )


def run(arrays: TransposableArrays, facts: TransposableFacts) -> jax.Array:
    """Search all tiles in one launch, also under vmap.

    Returns:
      bool[K, N].

    Raises:
      NotImplementedError: if the device or the call is not one that the kernel takes.

    Numerics:
      As "xla", to the bit.
    """
    check(facts)
    capability = check_device()
    # vmap adds rows.
    return fold_vmap(functools.partial(search, tile=find_tile(capability), capability=capability))(
        arrays.w
    )


def search(w_KN: jax.Array, *, tile: Tile, capability: tuple[int, int]) -> jax.Array:
    """Launch the kernel.

    Args:
      w_KN: float[K, N].
      tile: rows and columns of the weight that a program searches, 16 times a power of two in all.
      capability: (major, minor), compute capability.

    Returns:
      bool[K, N].
    """
    # Imported where it is launched: kernels need the extra.
    from pallas_kernels.transposable_mask.triton import kernel

    num_tiles = w_KN.size // TILE**2
    tiles_of_program = tile.rows * tile.columns // TILE**2
    results = launch(
        kernel.transposable_mask,
        {"w": w_KN},
        {"out": jax.ShapeDtypeStruct(w_KN.shape, jnp.bool_)},
        {
            "N": w_KN.shape[1],
            "TILES": num_tiles,
            "TILES_OF_PROGRAM": tiles_of_program,
            "MOST": find_most("float32"),
        },
        programs=-(-num_tiles // tiles_of_program),
        tile=tile,
        capability=capability,
    )
    return results["out"]
