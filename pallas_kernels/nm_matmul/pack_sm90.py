"""Packing on a GPU: one kernel reads weight and mask once and packs one or both orientations.

A program has one warpgroup and a tile of 64 rows (K) and 64 columns (N). Each thread holds two
blocks of four by four neighbours, which are whole groups along either axis. Values go to global
memory as they are selected. Positions go to shared memory, from which each thread gathers the eight
groups of one word of metadata. Larger tiles would read longer rows, and need registers that cost
half of the threads in flight.

Letters: K N as in `nm_matmul`.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.nm_matmul.packing import TILE, Compressed, select_two
from pallas_kernels.nm_matmul.thread_words import (
    NUM_THREADS,
    Place,
    Window,
    load_words,
    store_words,
    thread_index,
)

_GROUP = 4
_ACROSS = TILE // _GROUP  # blocks of a tile along either axis
_BLOCKS = _ACROSS * _ACROSS // NUM_THREADS  # blocks of a thread, one below the other


def pack_on_gpu(
    w: jax.Array, mask: jax.Array, *, along_k: bool, along_n: bool, interpreted: bool
) -> tuple[Compressed | None, Compressed | None]:
    """Launch the kernel.

    Args:
      w: bf16 or f16[K, N], K and N multiples of 64.
      mask: bool[K, N].
      along_k: bool, pack w^T [N, K].
      along_n: bool, pack w [K, N].
      interpreted: bool.

    Returns:
      tuple of both Compressed, None where not asked for.
    """
    num_rows, num_columns = w.shape
    options = {"interpreted": interpreted}

    def body(w_gmem, mask_gmem, *refs):
        outs, scratch_refs = refs[: len(out_type)], refs[len(out_type) :]
        nibbles = dict(zip(scratch, scratch_refs, strict=True))
        tile_k, tile_n = jax.lax.axis_index("k"), jax.lax.axis_index("n")
        place = {"row": tile_k * TILE, "column": tile_n * TILE}
        w_tile = Window(w_gmem, (TILE, TILE), **place)
        mask_tile = Window(mask_gmem, (TILE, TILE), **place)

        thread = thread_index()
        block_n, first_block_k = thread % _ACROSS, thread // _ACROSS * _BLOCKS
        column = block_n * _GROUP
        rows = [first_block_k * _GROUP + line for line in range(_BLOCKS * _GROUP)]
        places = [Place(row, column) for row in rows]
        # [rows of the blocks][columns]
        entries = [
            [_half(pair[j // 2], j % 2) for j in range(_GROUP)]
            for pair in load_words(w_tile, places, count=2, **options)
        ]
        kept = [
            [(flags >> (8 * j)) & 1 for j in range(_GROUP)]
            for (flags,) in load_words(mask_tile, places, **options)
        ]

        # Stored bit by bit, so that little is held in registers.
        if along_n:
            values_n = Window(
                outs[-2], (TILE, TILE // 2), row=tile_k * TILE, column=tile_n * (TILE // 2)
            )
            nibbles_n = Window(nibbles["n"], (TILE, _ACROSS))
            for lines in itertools.batched(range(len(rows)), _GROUP):
                words, codes = zip(*(_select(entries[x], kept[x]) for x in lines), strict=True)
                places = [Place(rows[x], 2 * block_n) for x in lines]
                store_words(values_n, places, [[word] for word in words], **options)
                places = [Place(rows[x], block_n) for x in lines]
                store_words(nibbles_n, places, [[code] for code in codes], **options)
        if along_k:
            values_k = Window(
                outs[0], (TILE, TILE // 2), row=tile_n * TILE, column=tile_k * (TILE // 2)
            )
            nibbles_k = Window(nibbles["k"], (_ACROSS, TILE))
            for j in range(_GROUP):
                columns = ([line[j] for line in lines] for lines in (entries, kept))
                groups = zip(*(itertools.batched(x, _GROUP) for x in columns), strict=True)
                words, codes = zip(*(_select(*group) for group in groups), strict=True)
                store_words(values_k, [Place(column + j, 2 * first_block_k)], [words], **options)
                # Beside the nibbles of its neighbours' columns, so that no banks conflict.
                at = j * _ACROSS + block_n
                places = [Place(first_block_k + i, at) for i in range(_BLOCKS)]
                store_words(nibbles_k, places, [[code] for code in codes], **options)

        # All positions are there.
        plgpu.commit_smem()
        line, quarter = thread // 32 * 16 + thread % 32 // 4, thread % 4
        # Zero, in a form that is not folded to a constant, which has no layout.
        only_row = thread >> 7
        if along_n:
            places = [Place(line + 8 * i, quarter * _GROUP) for i in range(2)]
            word = _join(load_words(nibbles_n, places, count=4, **options))
            metadata_n = Window(
                outs[-1], (1, NUM_THREADS), row=tile_k * (num_columns // TILE) + tile_n
            )
            store_words(metadata_n, [Place(only_row, thread)], [[word]], **options)
        if along_k:
            places = []
            for i in range(2):
                n = line + 8 * i
                at = n % _GROUP * _ACROSS + n // _GROUP
                places += [Place(quarter * _GROUP + group, at) for group in range(_GROUP)]
            loaded = [code for (code,) in load_words(nibbles_k, places, **options)]
            word = _join([loaded[:_GROUP], loaded[_GROUP:]])
            metadata_k = Window(outs[1], (1, NUM_THREADS), row=tile_n * (num_rows // TILE) + tile_k)
            store_words(metadata_k, [Place(only_row, thread)], [[word]], **options)

    scratch: dict[str, Any] = {}
    out_type = []
    if along_k:
        scratch["k"] = plgpu.SMEM((_ACROSS, TILE), jnp.uint32)
        out_type += _describe(num_columns, num_rows, w.dtype)
    if along_n:
        scratch["n"] = plgpu.SMEM((TILE, _ACROSS), jnp.uint32)
        out_type += _describe(num_rows, num_columns, w.dtype)
    body.__name__ = "pack_nm"
    outs = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=list(scratch.values()),
        grid=(num_rows // TILE, num_columns // TILE),
        grid_names=("k", "n"),
    )(w, mask)
    along = [
        Compressed(values, metadata.reshape(-1, 2 * values.shape[1] // TILE, NUM_THREADS))
        for values, metadata in zip(outs[::2], outs[1::2], strict=True)
    ]
    return along[0] if along_k else None, along[-1] if along_n else None


def _describe(rows: int, columns: int, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct((rows, columns // 2), dtype),
        jax.ShapeDtypeStruct((rows // TILE * (columns // TILE), NUM_THREADS), jnp.uint32),
    ]


def _select(entries: Sequence[jax.Array], kept: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return the two kept entries of a group as one word, and where they were."""
    first, second, code = select_two(entries, kept)
    return first | second << 16, code


def _half(word: jax.Array, index: int) -> jax.Array:
    return word >> 16 if index else word & 0xFFFF


def _join(nibbles: Sequence[Sequence[jax.Array]]) -> jax.Array:
    """Join the nibbles of two rows, four groups each, to a word of metadata."""
    word = jnp.zeros_like(nibbles[0][0])
    for half, groups in enumerate(nibbles):
        for i, nibble in enumerate(groups):
            word |= nibble << (16 * half + 4 * i)
    return word
