"""The contract of `transposable_mask` notices Triton kernels that are broken on purpose."""

import functools

import jax
import pytest

from pallas_kernels import transposable_mask
from pallas_kernels.transposable_mask import triton as package
from tests.kernels.broken_triton import break_kernel
from tests.kernels.transposable_contract import check_equals_xla, check_exact, check_not_finite
from tests.kernels.triton_interpreter import triton_kernels

_VALUES, _RACE = "Arrays are not equal", "race: program"
_BOUNDS, _UNWRITTEN = "outside of every array", "no program writes"
# Name -> what stands there, what is put in its place, who notices.
_BROKEN = {
    "a kind of patterns left out": ("tl.static_range(6)", "tl.static_range(5)", _VALUES),
    "a split left out": (
        "totals[1] + totals[4], bits[1] | bits[4]", "totals[0] + totals[5], bits[0] | bits[5]",
        _VALUES,
    ),
    "ties of a choice to the last": ("straight >= crossed", "straight > crossed", _VALUES),
    "ties of kinds to the last": ("other_bits > bits", "other_bits < bits", _VALUES),
    "ties of kinds to the one tried first": (
        " | ((other_total == total) & (other_bits > bits))", "", _VALUES
    ),
    "columns the other way round": (
        "(1 << 27) | (1 << 18) | (1 << 9) | 1", "(1 << 24) | (1 << 17) | (1 << 10) | (1 << 3)",
        _VALUES,
    ),
    "two rows exchanged": ("word + columns, bits >> 8", "word + columns, bits >> 4", _VALUES),
    "a row read twice": ("_load_row(w, start + N,", "_load_row(w, start + 2 * N,", _VALUES),
    "no cap": ("tl.where(magnitude < MOST, magnitude, MOST)", "magnitude", _VALUES),
    "NaN is nothing": (
        "tl.where(magnitude < MOST, magnitude, MOST)",
        "tl.where(magnitude >= MOST, MOST, tl.where(magnitude < MOST, magnitude, 0.0))", _VALUES,
    ),
    "signs count": ("tl.abs(row.to(tl.float32))", "row.to(tl.float32)", _VALUES),
    "stores beyond the last tile": (
        "& 0x01010101, mask=is_there", "& 0x01010101, mask=is_there | (at >= 0)", _BOUNDS
    ),
    "loads beyond the last tile": (
        "mask=is_there[:, None]", "mask=is_there[:, None] | (at >= 0)[:, None]", _BOUNDS
    ),
    "last tile dropped": ("tile < TILES", "tile < TILES - 1", _UNWRITTEN),
    "two programs write one tile": (
        "tl.program_id(0) * TILES_OF_PROGRAM", "tl.program_id(0) * (TILES_OF_PROGRAM // 2)", _RACE
    ),
    "a row is not written": ("word + 3 * columns", "word + 2 * columns", _UNWRITTEN),
}  # fmt: skip


@pytest.mark.ci
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU does not check memory")
@pytest.mark.parametrize("name", _BROKEN)
def test_broken_kernels_are_rejected(name, monkeypatch, tmp_path):
    old, new, message = _BROKEN[name]
    break_kernel(monkeypatch, tmp_path, package, "kernel", old, new)
    search = functools.partial(transposable_mask, implementation="triton")
    noticed = pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match=message)
    with noticed, triton_kernels():
        check_equals_xla(search, (8, 516), "float32")
        check_exact(search)
        check_not_finite(search)
