"""Packing on a GPU: one kernel reads weight and mask once and packs one or both orientations.

A gradient has no mask: another kernel, the same but for that, prunes it while packing.

A program has one warpgroup and a tile of 64 rows (K) and 64 columns (N). Each thread holds two
blocks of four by four neighbours, which are whole groups along either axis. Values go to global
memory as they are selected. Positions go to shared memory, from which each thread gathers the eight
groups of one word of metadata. Larger tiles would read longer rows, and need registers that cost
half of the threads in flight.

Letters: K N as in `nm_matmul`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.dispatch import check_hopper, is_interpreted
from pallas_kernels.mosaic_call import call_mosaic
from pallas_kernels.nm_matmul.call import PackArrays, PackFacts
from pallas_kernels.nm_matmul.mosaic_sm90.thread_words import (
    NUM_THREADS,
    Place,
    Window,
    load_words,
    rearrange,
    store_words,
    thread_index,
)
from pallas_kernels.nm_matmul.mvue import as_uniform, prune_group
from pallas_kernels.nm_matmul.packing import TILE, Compressed, PackedNM, select_two

_GROUP = 4
_ACROSS = TILE // _GROUP  # blocks of a tile along either axis
_BLOCKS = _ACROSS * _ACROSS // NUM_THREADS  # blocks of a thread, one below the other


def check_packing(facts: PackFacts) -> None:
    """Refuse to pack where the kernel cannot run.

    Raises:
      NotImplementedError: with the reason.
    """
    del facts
    check_hopper()


def pack_weight(arrays: PackArrays, facts: PackFacts) -> PackedNM:
    """Pack a weight with one kernel that reads it and its mask once."""
    options = {"along_k": facts.along_k, "along_n": facts.along_n}
    return PackedNM(*pack_on_gpu(*arrays, **options, interpreted=is_interpreted()))


def pack_on_gpu(
    w: jax.Array, mask: jax.Array, *, along_k: bool, along_n: bool, interpreted: bool
) -> tuple[Compressed | None, Compressed | None]:
    """Pack what a mask keeps.

    Args:
      w: bf16 or f16[K, N], K and N multiples of 64.
      mask: bool[K, N].
      along_k: bool, pack w^T [N, K].
      along_n: bool, pack w [K, N].

    Returns:
      tuple of both Compressed, None where not asked for.
    """

    def find_flags(mask_gmem, tile, block):
        window = Window(mask_gmem, (TILE, TILE), row=tile.row * TILE, column=tile.column * TILE)
        places = [Place(row, block.column * _GROUP) for row in _rows(block)]
        (flags,) = load_words(window, places, interpreted=interpreted)
        return [(flags >> (8 * j)) & 1 for j in range(_GROUP)]

    def choose(members, flags):
        return members, flags

    outs = _launch(
        w, mask, find_flags, choose, along_k=along_k, along_n=along_n, interpreted=interpreted
    )
    return outs[0] if along_k else None, outs[-1] if along_n else None


def prune_on_gpu(dz: jax.Array, bits: jax.Array, *, exact: bool, interpreted: bool) -> Compressed:
    """Prune a gradient to two of every four tokens, without bias, and pack it.

    Args:
      dz: bf16 or f16[M, N], M and N multiples of 64.
      bits: uint32[M/4, N], random, as `mvue.prune_mvue` draws them.
      exact: bool, whether the variance is the least possible.

    Returns:
      Compressed [N, M], of the values that `mvue.prune_mvue` keeps.
    """
    dtype = dz.dtype

    def draw(bits_gmem, tile, block):
        window = Window(
            bits_gmem, (_ACROSS, TILE), row=tile.row * _ACROSS, column=tile.column * TILE
        )
        places = [Place(block.row + i, block.column * _GROUP) for i in range(_BLOCKS)]
        # One number serves a group of tokens, whichever of them it is looked up for.
        return [
            rearrange(
                [stack], [(0, i) for i in range(_BLOCKS) for _ in range(_GROUP)],
                interpreted=interpreted,
            )
            for stack in load_words(window, places, count=_GROUP, interpreted=interpreted)
        ]  # fmt: skip

    def prune(members, drawn):
        values, kept = prune_group(
            [_as_float(x, dtype) for x in members], as_uniform(drawn[0]), exact=exact
        )
        return [_as_bits(x, dtype) for x in values], [x.astype(jnp.uint32) for x in kept]

    (packed,) = _launch(dz, bits, draw, prune, along_k=True, along_n=False, interpreted=interpreted)
    return packed


def _launch(
    w: jax.Array,
    guide: jax.Array,
    read_guide: Callable[..., list[jax.Array]],
    choose: Callable[..., Any],
    *,
    along_k: bool,
    along_n: bool,
    interpreted: bool,
) -> list[Compressed]:
    """Launch a kernel that packs what is chosen.

    Args:
      w: bf16 or f16[K, N].
      guide: array that says what is chosen.
      read_guide: function of the reference to it, which tile, and which first block of a thread;
        returns for each of four columns a stack of what belongs to the rows of a thread.
      choose: function of the four members of a thread's groups, 16 bits in uint32, and of what was
        read for them; returns the members, and which are kept, uint32 of 1 or 0.

    Returns:
      list of Compressed, along K before along N.
    """
    num_rows, num_columns = w.shape
    options = {"interpreted": interpreted}

    def body(w_gmem, guide_gmem, *refs):
        outs, scratch_refs = refs[: len(out_type)], refs[len(out_type) :]
        nibbles = dict(zip(scratch, scratch_refs, strict=True))
        tile_k, tile_n = jax.lax.axis_index("k"), jax.lax.axis_index("n")
        thread = thread_index()
        block_n, first_block_k = thread % _ACROSS, thread // _ACROSS * _BLOCKS
        block = Place(first_block_k, block_n)
        rows, column = _rows(block), block_n * _GROUP

        # Four columns, each a stack of the rows of a thread.
        w_tile = Window(w_gmem, (TILE, TILE), row=tile_k * TILE, column=tile_n * TILE)
        pairs = load_words(w_tile, [Place(row, column) for row in rows], count=2, **options)
        entries = [half for pair in pairs for half in (pair & 0xFFFF, pair >> 16)]
        guides = read_guide(guide_gmem, Place(tile_k, tile_n), block)

        if along_n:
            word, code = _select(*choose(entries, guides))
            values_n = Window(
                outs[-2], (TILE, TILE // 2), row=tile_k * TILE, column=tile_n * (TILE // 2)
            )
            store_words(values_n, [Place(row, 2 * block_n) for row in rows], [word], **options)
            nibbles_n = Window(nibbles["n"], (TILE, _ACROSS))
            store_words(nibbles_n, [Place(row, block_n) for row in rows], [code], **options)
        if along_k:
            # Four rows, each a stack of the columns of a thread's blocks.
            members, guides = (
                [
                    rearrange(
                        columns,
                        [(j, b * _GROUP + i) for b in range(_BLOCKS) for j in range(_GROUP)],
                        **options,
                    )
                    for i in range(_GROUP)
                ]
                for columns in (entries, guides)
            )
            word, code = _select(*choose(members, guides))
            values_k = Window(
                outs[0], (TILE, TILE // 2), row=tile_n * TILE, column=tile_k * (TILE // 2)
            )
            words = [
                rearrange([word], [(0, b * _GROUP + j) for j in range(_GROUP)], **options)
                for b in range(_BLOCKS)
            ]
            places = [Place(column + j, 2 * first_block_k) for j in range(_GROUP)]
            store_words(values_k, places, words, **options)
            nibbles_k = Window(nibbles["k"], (_ACROSS, TILE))
            # Beside the nibbles of its neighbours' columns, so that no banks conflict.
            places = [
                Place(first_block_k + b, j * _ACROSS + block_n)
                for b in range(_BLOCKS)
                for j in range(_GROUP)
            ]
            store_words(nibbles_k, places, [code], **options)

        # All positions are there.
        plgpu.commit_smem()
        lines, quarter = (
            [thread // 32 * 16 + thread % 32 // 4 + 8 * i for i in range(2)],
            thread % 4,
        )
        # Zero, in a form that is not folded to a constant, which has no layout.
        only_row = thread >> 7
        if along_n:
            places = [Place(line, quarter * _GROUP) for line in lines]
            groups = load_words(nibbles_n, places, count=_GROUP, **options)
            metadata_n = Window(
                outs[-1], (1, NUM_THREADS), row=tile_k * (num_columns // TILE) + tile_n
            )
            word = _join(groups, **options)
            store_words(metadata_n, [Place(only_row, thread)], [word], **options)
        if along_k:
            groups = [
                load_words(
                    nibbles_k,
                    [
                        Place(quarter * _GROUP + group, line % _GROUP * _ACROSS + line // _GROUP)
                        for line in lines
                    ],
                    **options,
                )[0]
                for group in range(_GROUP)
            ]
            metadata_k = Window(outs[1], (1, NUM_THREADS), row=tile_n * (num_rows // TILE) + tile_k)
            word = _join(groups, **options)
            store_words(metadata_k, [Place(only_row, thread)], [word], **options)

    scratch: dict[str, Any] = {}
    out_type = []
    if along_k:
        scratch["k"] = plgpu.SMEM((_ACROSS, TILE), jnp.uint32)
        out_type += _describe(num_columns, num_rows, w.dtype)
    if along_n:
        scratch["n"] = plgpu.SMEM((TILE, _ACROSS), jnp.uint32)
        out_type += _describe(num_rows, num_columns, w.dtype)
    body.__name__ = "pack_nm"
    outs = call_mosaic(
        body,
        w,
        guide,
        out_type=out_type,
        scratch_types=list(scratch.values()),
        grid=(num_rows // TILE, num_columns // TILE),
        grid_names=("k", "n"),
    )
    return [
        Compressed(values, metadata.reshape(-1, 2 * values.shape[1] // TILE, NUM_THREADS))
        for values, metadata in zip(outs[::2], outs[1::2], strict=True)
    ]


def _rows(block: Place) -> list[jax.Array]:
    """Return the rows of a thread's blocks."""
    return [block.row * _GROUP + line for line in range(_BLOCKS * _GROUP)]


def _describe(rows: int, columns: int, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct((rows, columns // 2), dtype),
        jax.ShapeDtypeStruct((rows // TILE * (columns // TILE), NUM_THREADS), jnp.uint32),
    ]


def _select(entries: Sequence[jax.Array], kept: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return the two kept entries of a group as one word, and where they were."""
    first, second, code = select_two(entries, kept)
    return first | second << 16, code


def _as_float(bits: jax.Array, dtype: Any) -> jax.Array:
    """Return the value of which 16 bits are given, in f32."""
    value = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), dtype)
    return value.astype(jnp.float32)


def _as_bits(value: jax.Array, dtype: Any) -> jax.Array:
    """Return the 16 bits of a value that is rounded."""
    return jax.lax.bitcast_convert_type(value.astype(dtype), jnp.uint16).astype(jnp.uint32)


def _join(groups: Sequence[jax.Array], **options: Any) -> jax.Array:
    """Join the nibbles of two rows, a stack for each of four groups, to words of metadata."""
    halves = groups[0]
    for i, nibbles in enumerate(groups[1:], start=1):
        halves |= nibbles << (4 * i)
    lower, upper = (rearrange([halves], [(0, i)], **options) for i in range(2))
    return lower | upper << 16
