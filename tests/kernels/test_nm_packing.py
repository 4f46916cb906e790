"""Packed 2:4 weights, against an emulation of the instruction that reads them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import PackedNM, pack_nm, prune_mvue, unpack_nm
from pallas_kernels.dispatch import is_interpreted
from pallas_kernels.doctor.oracles import make_nm_masks, make_normal
from pallas_kernels.nm_matmul.mosaic_sm90.pack import prune_on_gpu
from pallas_kernels.nm_matmul.mosaic_sm90.wgmma_sp import operand_offsets
from pallas_kernels.nm_matmul.packing import compress
from tests.kernels.implementations import interpret
from tests.kernels.interpreter import hopper

# Two positions, the first in the low bits, the second greater: all others are undefined.
jit_pack, jit_unpack = (
    jax.jit(pack_nm, static_argnames=("axis", "implementation")),
    jax.jit(unpack_nm),
)
LEGAL = {0x4, 0x8, 0xC, 0x9, 0xD, 0xE}


def emulate_instruction(values, words, selector):
    """Return the dense A[64, 32] that `wgmma.mma_async.sp.m64nNk32` multiplies by, and its nibbles.

    Written after the PTX ISA: of every four lanes, two supply metadata, which the selector chooses.
    Such a lane describes 16 columns of row lane / 4 of its warp's 16 rows in its lower half and of
    the row 8 further down in its upper half.
    """
    dense, nibbles = np.zeros((64, 32), values.dtype), set()
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        if lane % 4 // 2 != selector:
            continue
        for upper in range(2):
            row = 16 * warp + lane // 4 + 8 * upper
            bits = int(words[thread]) >> (16 * upper) & 0xFFFF
            for group in range(4):
                nibble = bits >> (4 * group) & 0xF
                nibbles.add(nibble)
                column = 16 * (lane % 2) + 4 * group
                for which, position in enumerate((nibble & 3, nibble >> 2)):
                    dense[row, column + position] += values[row, column // 2 + which]
    return dense, nibbles


def emulate(compressed):
    """Return what the tensor cores see of a whole matrix [R, C], and all nibbles."""
    values, metadata = (np.asarray(x) for x in compressed)
    rows, columns = values.shape[0], 2 * values.shape[1]
    dense, nibbles = np.zeros((rows, columns), values.dtype), set()
    for i in range(rows // 64):
        for step in range(columns // 32):
            here = slice(64 * i, 64 * i + 64)
            tile, found = emulate_instruction(
                values[here, 16 * step : 16 * step + 16], metadata[i, step // 2], step % 2
            )
            dense[here, 32 * step : 32 * step + 32] = tile
            nibbles |= found
    return dense, nibbles


def make_weight(shape, *, transposable=False, dtype="bfloat16"):
    (w,) = make_normal((shape,), dtype)
    masks = make_nm_masks(shape, (2, 4), transposable=transposable)
    return w, {name: jnp.asarray(mask) for name, mask in masks.items()}


def masked(w, mask):
    return np.asarray(jnp.where(mask, w, 0))


def assert_same_bits(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        kind = np.uint16 if x.dtype.itemsize == 2 else np.uint32
        np.testing.assert_array_equal(np.asarray(x).view(kind), np.asarray(y).view(kind))


# Kernels beside what runs everywhere; they are interpreted.
IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("triton", marks=pytest.mark.ci)]
)


@IMPLEMENTATIONS
@pytest.mark.parametrize("name", ["whole", "underfull", "empty"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensor_cores_see_the_masked_weight(name, dtype, implementation):
    w, masks = make_weight((128, 192), transposable=True, dtype=dtype)
    with interpret(implementation):
        packed = jit_pack(w, masks[name], axis="both", implementation=implementation)
    expected = masked(w, masks[name])
    along_n, nibbles = emulate(packed.along_n)
    np.testing.assert_array_equal(along_n, expected)
    assert nibbles <= LEGAL
    along_k, nibbles = emulate(packed.along_k)
    np.testing.assert_array_equal(along_k, expected.T)
    assert nibbles <= LEGAL
    assert name != "whole" or nibbles == LEGAL, "not every pair of positions was tried"
    assert packed.along_k.values.size == w.size // 2
    assert packed.along_k.metadata.nbytes == w.size // 8


@IMPLEMENTATIONS
@pytest.mark.parametrize("kept", range(16))
def test_every_group(kept, implementation):
    # All ways to keep some of four, with values that only their sign bit tells from nothing.
    flags = [bool(kept >> i & 1) for i in range(4)]
    w = jnp.full((64, 64), -0.0, jnp.bfloat16).at[:, 1::4].set(jnp.nan).at[:, 2::4].set(3.0)
    mask = jnp.tile(jnp.array(flags), (64, 16))
    if sum(flags) > 2:
        message = f"mask must keep at most 2 of every 4 .* row 0 keeps {sum(flags)} of columns 0"
        with pytest.raises(ValueError, match=message):
            pack_nm(w, mask, axis=1)
        first_two = mask & (jnp.cumsum(mask.reshape(64, 16, 4), axis=2).reshape(64, 64) <= 2)
        with interpret(implementation):
            packed = jit_pack(w, mask, axis=1, implementation=implementation)
        assert_same_bits(jit_unpack(packed), jnp.where(first_two, w, 0))
        return
    with interpret(implementation):
        packed = jit_pack(w, mask, axis=1, implementation=implementation)
    assert_same_bits(jit_unpack(packed), jnp.where(mask, w, 0))
    _, nibbles = emulate(packed.along_n)
    assert len(nibbles) == 1 and nibbles <= LEGAL


def test_equal_magnitudes_are_told_apart_by_the_mask_alone():
    w = jnp.ones((64, 64), jnp.bfloat16)
    mask = make_weight((64, 64))[1]["whole"]
    np.testing.assert_array_equal(emulate(jit_pack(w, mask).along_k)[0], masked(w, mask).T)


@pytest.mark.ci
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    shape=st.sampled_from([(64, 64), (64, 128), (192, 64)]),
    axis=st.sampled_from([0, 1, "both"]),
)
def test_unpacking_inverts_packing(seed, shape, axis):
    (w,) = make_normal((shape,), "bfloat16", seed=seed)
    mask = make_nm_masks(shape, (2, 4), transposable=True, seed=seed)["underfull"]
    packed = pack_nm(w, jnp.asarray(mask), axis=axis)
    assert packed.shape == shape and packed.dtype == w.dtype
    assert_same_bits(unpack_nm(packed), jnp.where(mask, w, 0))


@pytest.mark.ci
@IMPLEMENTATIONS
def test_stacked_weights(implementation):
    w, masks = make_weight((64, 128))
    stacked = jnp.stack([w, 2 * w]), jnp.stack([masks["whole"], masks["underfull"]])
    with interpret(implementation):
        packed = jit_pack(*stacked, implementation=implementation)
    assert packed.shape == (2, 64, 128)
    assert_same_bits(jit_unpack(packed), jnp.where(stacked[1], stacked[0], 0))
    assert_same_bits(jax.tree.map(lambda x: x[1], packed), jit_pack(2 * w, masks["underfull"]))


@pytest.mark.ci
@pytest.mark.parametrize("implementation", ["mosaic_sm90", "triton"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((128, 64), "both"), ((64, 128), "both"), ((64, 64), 0), ((64, 128), 1)],
    ids=str,
)
def test_the_kernel_packs_the_same_bits(shape, axis, implementation):
    w, masks = make_weight(shape, transposable=True)
    w = w.at[0, 0].set(-0.0)
    expected = pack_nm(w, masks["underfull"], axis=axis, implementation="xla")
    with interpret(implementation):
        pack = jax.jit(functools.partial(pack_nm, axis=axis, implementation=implementation))
        actual = pack(w, masks["underfull"])
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert_same_bits(actual, expected)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("dtype", "exact"),
    [("bfloat16", False), ("float16", True)],
)
def test_the_kernel_prunes_and_packs_the_same_bits(dtype, exact):
    (dz,) = make_normal(((128, 64),), dtype)
    dz = dz.at[:8].set(0)
    key = jax.random.key(2)
    pruned, mask = prune_mvue(dz, key, axis=0, exact=exact)
    bits = jax.random.bits(key, (32, 64), jnp.uint32)
    with hopper():
        actual = jax.jit(
            lambda dz, bits: prune_on_gpu(dz, bits, exact=exact, interpreted=is_interpreted())
        )(dz, bits)
    assert_same_bits(actual, compress(pruned.T, mask.T))


def _swap_pairs(packed):
    values = packed.along_k.values
    return values.reshape(*values.shape[:-1], -1, 2)[..., ::-1].reshape(values.shape)


def _broken(packed, kind):
    values, metadata = packed.along_k
    if kind == "values swapped":
        values = _swap_pairs(packed)
    elif kind == "rows swapped":
        metadata = (metadata >> 16) | (metadata << 16)
    elif kind == "selectors swapped":
        metadata = metadata.reshape(*metadata.shape[:2], 64, 2)[..., ::-1].reshape(metadata.shape)
    elif kind == "warps swapped":
        metadata = jnp.roll(metadata, 32, axis=-1)
    return PackedNM(packed.along_k._replace(values=values, metadata=metadata), None)


@pytest.mark.parametrize(
    "kind", ["values swapped", "rows swapped", "selectors swapped", "warps swapped"]
)
def test_the_emulation_rejects_other_layouts(kind):
    w, masks = make_weight((64, 64))
    packed = jit_pack(w, masks["whole"])
    dense, _ = emulate(_broken(packed, kind).along_k)
    assert (dense != masked(w, masks["whole"]).T).any()


def _swizzle(address, swizzle):
    """Return where the memory has a byte: 16-byte units of a row change places, by row."""
    rows_of_atom = {128: 7, 64: 3, 32: 1}[swizzle]
    return address ^ ((address >> 7 & rows_of_atom) << 4)


@pytest.mark.parametrize("contraction", [64, 128])
def test_operands_of_each_instruction_start_where_they_lie(contraction):
    """Tiles as copies write them, read from an address that was moved along the contraction."""
    rows = 64
    # Values: rows of C/2, one tile as wide as a swizzle. Dense: rows of C in tiles of 64, and each
    # instruction takes 32 of them.
    offsets = operand_offsets(
        contraction // 32,
        values_stride=32,
        dense_stride=64,
        steps_of_tile=2,
        tile_stride=rows * 128,
    )
    for step, (values_offset, dense_offset) in enumerate(offsets):
        for width, swizzle, offset, taken in (
            (contraction // 2, contraction, values_offset, 16),
            (contraction, 128, dense_offset, 32),
        ):
            tile = swizzle // 2
            written = {
                _swizzle(t * rows * swizzle + row * swizzle + 2 * k, swizzle): (row, t * tile + k)
                for t in range(width // tile)
                for row in range(rows)
                for k in range(tile)
            }
            for row in range(rows):
                for k in range(taken):
                    address = _swizzle(offset + row * swizzle + 2 * k, swizzle)
                    assert written[address] == (row, step * taken + k)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axis": 2}, "axis must be 0, 1 or 'both', got 2"),
        ({"w": jnp.ones((64, 64))}, "w must be bfloat16 or float16, got w.dtype=.*float32"),
        ({"w": jnp.ones((64, 32), jnp.bfloat16)}, r"multiples of 64, got w.shape=\(64, 32\)"),
        ({"mask": jnp.ones((64, 128), bool)}, r"mask must be bool\[64, 64\], got bool\[64, 128\]"),
        ({"mask": jnp.ones((64, 64))}, r"mask must be bool\[64, 64\], got float32\[64, 64\]"),
        ({"implementation": "dense"}, "implementation must be .* got 'dense'"),
        ({"mask": jnp.ones((64, 64), bool)}, "column 0 keeps 4 of rows 0 to 3"),
    ],
)
def test_what_cannot_be_packed_is_refused(change, message):
    w, masks = make_weight((64, 64))
    with pytest.raises(ValueError, match=message):
        pack_nm(**{"w": w, "mask": masks["whole"]} | change)


def test_the_kernel_is_refused_where_there_is_no_hopper():
    if jax.default_backend() == "gpu":
        pytest.skip("there may be one")
    w, masks = make_weight((64, 64))
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        pack_nm(w, masks["whole"], implementation="mosaic_sm90")
