"""Places in docs/nm_fragments.png are those of the machine that runs PTX, and of packed words."""

import pathlib
import runpy

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nm_matmul.packing import Compressed, decompress
from tests.kernels.ptx_ampere import unpack_right
from tests.kernels.ptx_machine import WARP
from tests.kernels.ptx_tensor_cores import accumulator_places, spread, unpack_left

PLACES = runpy.run_path(
    str(pathlib.Path(__file__).parents[2] / "docs" / "draw_nm_fragments.py"), run_name="places"
)
# Positions 0 and 1 of every group, and 2 and 3.
FIRST_TWO, LAST_TWO = 0x44444444, 0xEEEEEEEE


@pytest.mark.parametrize(
    ("hold", "unpack"), [("hold_values", unpack_left), ("hold_dense", unpack_right)]
)
def test_operands(hold, unpack):
    # Halves of four words that say whose they are: 8 lane + number.
    halves = 8 * np.arange(WARP)[:, None] + np.arange(8)
    words = np.ascontiguousarray(halves.astype(np.uint16)).view(np.uint32).T
    lanes, numbers = PLACES[hold]()
    np.testing.assert_array_equal(8 * lanes + numbers, unpack(list(words)).reshape(lanes.shape))


def test_sums():
    lanes, numbers = PLACES["hold_sums"]()
    row, column = accumulator_places(8, WARP)
    np.testing.assert_array_equal(lanes[row, column], np.broadcast_to(np.arange(WARP), row.shape))
    np.testing.assert_array_equal(numbers[row, column], np.arange(4)[:, None] + 0 * row)


def spread_words(words, selector):
    """Return which of A[16, 32] are kept, as `mma.sp` reads a word of each lane."""
    return spread(np.ones((16, 16), np.float32), words, selector)


def decompress_words(words, selector):
    """Return the same of a strip of 16 rows and 64 columns as it is packed."""
    metadata = jnp.tile(jnp.asarray(words), 4)[None, None]
    dense = decompress(Compressed(jnp.ones((64, 32), jnp.bfloat16), metadata))
    return np.asarray(dense[:16, 32 * selector :][:, :32], np.float32)


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize("read", [spread_words, decompress_words])
def test_metadata(read, selector):
    lanes, bits = PLACES["hold_metadata"](selector)
    # Each word, and each four bits of it, by itself.
    for chosen_lanes, chosen_bits in [
        *((np.array([lane]), np.arange(0, 32, 4)) for lane in range(WARP)),
        *((np.arange(WARP), np.array([bit])) for bit in range(0, 32, 4)),
    ]:
        changed = sum(0xF << bit for bit in chosen_bits.tolist())
        words = np.full(WARP, FIRST_TWO, np.uint32)
        words[chosen_lanes] = FIRST_TWO & ~changed | LAST_TWO & changed
        keeps_last = np.isin(lanes, chosen_lanes) & np.isin(bits, chosen_bits)
        expected = np.where(keeps_last[..., None], [0, 0, 1, 1], [1, 1, 0, 0])
        np.testing.assert_array_equal(read(words, selector), expected.reshape(16, 32))
