"""The tests of packing and pruning notice Triton kernels that are broken on purpose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import pack_nm
from pallas_kernels.doctor.oracles import make_nm_masks, make_normal
from pallas_kernels.nm_matmul import triton as package
from tests.kernels.broken_triton import break_kernel
from tests.kernels.test_triton_nm import assert_same, prune, prune_one_by_one
from tests.kernels.triton_interpreter import triton_kernels

pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU does not check memory"),
]
_OFF, _BOUNDS, _RACE = "not equal", "outside of every array", "race: program"

# Name -> what stands in the file, what is put in its place, who notices.
_BROKEN_PACKING = {
    "halves of a word swapped": ("16 * half +", "16 * (1 - half) +", _OFF),
    "second position is 2 where it is 3": ("second_is_2, 2, 3)", "second_is_2, 2, 2)", _OFF),
    "what the mask removed is stored": ("kept3 != 0, w3, zero)", "kept3 != 9, w3, zero)", _OFF),
    "values in the wrong order": ("join(first, second)", "join(second, first)", _OFF),
    "the mask is not turned": ("tl.trans(mask_tile)", "mask_tile", _OFF),
    "words along K in the order of those along N": (
        "((b * tiles_n + n) * tiles_k + k)", "((b * tiles_k + k) * tiles_n + n)", _OFF
    ),
    "rows as far apart as along the other axis": (
        "K // 2, TILE", "N // 2, TILE", f"{_BOUNDS}|{_RACE}"
    ),
    "every weight is the first": ("start = (b * K +", "start = (0 * K +", f"{_OFF}|{_RACE}"),
    "one word too far": ("metadata_n + ((", "metadata_n + 1 + ((", f"{_BOUNDS}|{_RACE}"),
}  # fmt: skip


@pytest.mark.parametrize("name", _BROKEN_PACKING)
def test_broken_packing_is_rejected(name, monkeypatch, tmp_path):
    old, new, message = _BROKEN_PACKING[name]
    break_kernel(monkeypatch, tmp_path, package, "pack_kernel", old, new)
    (w,) = make_normal(((2, 128, 192),), "bfloat16")
    mask = jnp.asarray(make_nm_masks((128, 192), (2, 4), transposable=True)["underfull"])
    pack = functools.partial(pack_nm, axis="both")
    masks = jnp.stack([mask, mask[:, ::-1]])
    expected = pack(w, masks, implementation="xla")
    noticed = pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match=message)
    with noticed, triton_kernels():
        packed = jax.jit(functools.partial(pack, implementation="triton"))(w, masks)
        for x, y in zip(jax.tree.leaves(packed), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(x, y)


# Name -> whether the exact estimator shows it, and as above.
_BROKEN_PRUNING = {
    "ties by the wrong order": (True, "(b0 <= b1)", "(b0 < b1)", _OFF),
    "a draw on a boundary": (True, "drawn >= c4", "drawn > c4", _OFF),
    "a boundary of the dominated": (True, "dominated = a4 >= rest", "dominated = a4 > total", _OFF),
    "the sign of zero": (True, "tl.where(x < 0, -1.0, x))", "tl.where(x < 0, -1.0, 0.0))", _OFF),
    "NaN is the smallest": (True, 'float("inf"), tl.abs(x))', "0.0, tl.abs(x))", _OFF),
    "no floor": (False, "tl.div_rn(a, total) + _FLOOR", "tl.div_rn(a, total)", _OFF),
    "another order of a sum": (False, "x0, p01 + p02 + p03)", "x0, p03 + p02 + p01)", _OFF),
    "a product and a sum in one": (
        False, "p01 + p12 + p13)", "tl.fma(t0 * t1, odds0 + odds1, p12) + p13)", _OFF
    ),
    "the lowest bits are drawn": (False, "random >> 8", "random & 16777215", _OFF),
    "two members are one": (False, "x + 2 * C + at", "x + C + at", _OFF),
    "columns that are not there": (
        False, "(column < C - first_column)", "(column < COLUMNS)", f"{_BOUNDS}|{_RACE}"
    ),
    "rows that are not there": (False, "(row < R - first_row)", "(row < ROWS)", _BOUNDS),
    "members apart by a row": (False, "pruned + C + at", "pruned + 4 * C + at", _RACE),
}  # fmt: skip


@pytest.mark.parametrize("name", _BROKEN_PRUNING)
def test_broken_pruning_is_rejected(name, monkeypatch, tmp_path):
    exact, old, new, message = _BROKEN_PRUNING[name]
    break_kernel(monkeypatch, tmp_path, package, "prune_kernel", old, new)
    (x,) = make_normal(((20, 77),), "float32")
    x = (
        x.at[:4]
        .set(jnp.array([0.0, -0.0, 0.0, -0.0])[:, None])
        .at[4, ::7]
        .set(jnp.nan)
        .at[8:12]
        .set(1)
    )
    noticed = pytest.raises((AssertionError, jax.errors.JaxRuntimeError), match=message)
    with noticed:
        actual = prune(x, axis=0, exact=exact)
        assert_same(actual, prune_one_by_one(x, axis=0, exact=exact))
