"""What `nm_matmul` and its companions refuse, in which words, and which backend runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PackedNM, check_nm_mask, nm_matmul, pack_nm
from tests.kernels.interpreter import hopper

_X = jnp.ones((2, 8))
_W = jnp.ones((8, 12))
_MASK = jnp.arange(8)[:, None] % 4 < jnp.full(12, 2)
_KEY = jax.random.key(0)
_BITS = jnp.zeros((1, 12), jnp.uint32)


def _call(**changes):
    arguments = {"x": _X, "w": _W, "mask": _MASK} | changes
    return nm_matmul(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": _X[0, 0]}, r"x must be \[..., K\] and w \[K, N\], got x.shape=\(\)"),
        ({"x": _X[:, :4]}, r"got x.shape=\(2, 4\), w.shape=\(8, 12\)"),
        ({"w": _W[None]}, r"x must be .* w.shape=\(1, 8, 12\)"),
        ({"x": _X[:0]}, r"must not be empty, got x.shape=\(0, 8\)"),
        ({"x": _X.astype(jnp.int32)}, "must share one of float32.*x.dtype=dtype.'int32'"),
        ({"w": _W.astype(jnp.bfloat16)}, "must share one of float32.*w.dtype=dtype.bfloat16"),
        ({"mask": _MASK.astype(jnp.float32)}, r"mask must be bool\[8, 12\], got float32\[8, 12\]"),
        ({"mask": _MASK.T}, r"mask must be bool\[8, 12\], got bool\[12, 8\]"),
        ({"bias": jnp.ones(8)}, r"bias must be float32\[12\] or None, got float32\[8\]"),
        ({"bias": jnp.ones(12, jnp.float16)}, r"bias must be float32\[12\] .*got float16\[12\]"),
        ({"transposable": 1}, "transposable must be a bool, got transposable=1"),
        ({"check_mask": None}, "check_mask must be a bool, got check_mask=None"),
        ({"activation": "relu"}, "activation must be one of .*'swiglu'.*, got 'relu'"),
        ({"activation": ["gelu"]}, r"activation must be one of .*, got \['gelu'\]"),
        (
            {"activation": "geglu", "w": _W[:, :3], "mask": _MASK[:, :3]},
            r"activation='geglu' needs an even N, got w.shape=\(8, 3\)",
        ),
        ({"grad_pruning": "topk", "key": _KEY}, "grad_pruning must be one of .*, got 'topk'"),
        (
            {"grad_pruning": "mvue"},
            "exactly one of key and bits must be given where grad_pruning='mvue', got neither",
        ),
        (
            {"grad_pruning": "mvue_exact", "key": _KEY, "bits": _BITS},
            "exactly one of key and bits .* grad_pruning='mvue_exact', got key and bits",
        ),
        ({"key": _KEY}, "key and bits must be None where grad_pruning='none', .* got key$"),
        ({"bits": _BITS}, "key and bits must be None where grad_pruning='none', .* got bits$"),
        (
            {"grad_pruning": "mvue", "bits": jnp.zeros((2, 12), jnp.uint32)},
            r"bits must be uint32\[..., 12\] of 1 rows, .* of 2 tokens, got uint32\[2, 12\]",
        ),
        (
            {"grad_pruning": "mvue", "bits": jnp.zeros((1, 8), jnp.uint32)},
            r"bits must be uint32\[..., 12\] of 1 rows, .* got uint32\[1, 8\]",
        ),
        (
            {"grad_pruning": "mvue", "bits": jnp.uint32(0)},
            r"bits must be uint32\[..., 12\] of 1 rows, .* got uint32\[\]",
        ),
        (
            {"grad_pruning": "mvue", "bits": jnp.zeros((1, 12), jnp.int32)},
            r"bits must be uint32\[..., 12\] of 1 rows, .* got int32\[1, 12\]",
        ),
        (
            {"grad_pruning": "mvue", "bits": _KEY},
            r"bits must be uint32\[..., 12\] of 1 rows, .* got key<fry>\[\]",
        ),
        (
            {"grad_pruning": "mvue", "key": jnp.zeros(2, jnp.uint32)},
            r"key must be one typed key, as jax.random.key makes it, got uint32\[2\]",
        ),
        (
            {"grad_pruning": "mvue", "key": jax.random.split(_KEY)},
            r"key must be one typed key, .*\[2\]",
        ),
        ({"pattern": (0, 4)}, r"pattern must be two ints .*got \(0, 4\)"),
        ({"pattern": (5, 4)}, r"pattern must be two ints .*got \(5, 4\)"),
        ({"pattern": (2.0, 4)}, r"pattern must be two ints .*got \(2.0, 4\)"),
        ({"pattern": "2:4"}, "pattern must be two ints .*got '2:4'"),
        (
            {"pattern": (2, 16)},
            r"K must be a multiple of 16 for pattern=\(2, 16\), transposable=False, got K=8",
        ),
        (
            {"transposable": True, "pattern": (4, 8)},
            r"N must be a multiple of 8 for pattern=\(4, 8\), transposable=True, got N=12",
        ),
        (
            {"mask": _MASK.at[6, 3].set(True)},
            "at most 2 of every 4 consecutive entries of a column; column 3 keeps 3 of rows 4 to 7",
        ),
        ({"pattern": (1, 4)}, "at most 1 of every 4 .* column 0 keeps 2 of rows 0 to 3"),
        (
            {"transposable": True},
            "transposable=True, but mask must .* row 0 keeps 4 of columns 0 to 3",
        ),
        ({"packed": _W}, "packed must be a PackedNM or None, got ArrayImpl"),
        ({"implementation": "cuda"}, "implementation must be None or one of .* got 'cuda'"),
        ({"implementation": "dense"}, "one of .*'xla'.* for nm_matmul, got 'dense'"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        _call(**changes)


def test_arguments_are_refused_while_tracing():
    with pytest.raises(ValueError, match="got K=6"):
        jax.eval_shape(nm_matmul, _X[:, :6], _W[:6], _MASK[:6])
    # The values of a traced mask are not known, nor looked at.
    assert jax.eval_shape(nm_matmul, _X, _W, ~_MASK & _MASK | True).shape == (2, 12)


_W64 = jnp.ones((64, 128), jnp.bfloat16)
_MASK64 = (jnp.arange(64)[:, None] + jnp.arange(128)) % 2 == 0


# Functions: what a module computes is compiled by all workers at once.
@functools.cache
def _pack():
    return jax.jit(functools.partial(pack_nm, axis="both"))(_W64, _MASK64)


def _pack_along(name):
    return lambda: PackedNM(**{"along_k": None, "along_n": None, name: getattr(_pack(), name)})


def _pack_too_little(name):
    def make():
        part = getattr(_pack(), name)
        cut = part._replace(metadata=part.metadata[:1, :1])
        return dataclasses.replace(_pack(), **{name: cut})

    return make


def _pack_two():
    return jax.tree.map(lambda x: jnp.stack([x, x]), _pack())


@pytest.mark.parametrize(
    ("make_packed", "changes", "message"),
    [
        (_pack_along("along_n"), {}, r"pack_nm\(axis=0\).*along_k=None, along_n=packed"),
        (
            _pack_along("along_k"),
            {"transposable": True},
            r"pack_nm\(axis='both'\) for transposable=True.*along_n=None",
        ),
        (
            _pack,
            {"w": _W64[:, :64]},
            r"packed.shape=\(64, 128\), .* w.shape=\(64, 64\)",
        ),
        (
            _pack_two,
            {},
            r"packed.shape=\(2, 64, 128\)",
        ),
        (
            _pack,
            {"dtype": jnp.float16},
            "must have the shape and dtype of w.*w.dtype=dtype.'float16'",
        ),
        (
            _pack_too_little("along_k"),
            {},
            r"packed.along_k must hold uint32\[2, 1, 128\], .* got uint32\[1, 1, 128\]",
        ),
        (
            _pack_too_little("along_n"),
            {"transposable": True},
            r"packed.along_n must hold uint32\[1, 2, 128\], .* got uint32\[1, 1, 128\]",
        ),
    ],
)
def test_a_packed_weight_that_does_not_fit_is_refused(make_packed, changes, message):
    packed = make_packed()
    w = changes.get("w", _W64).astype(changes.get("dtype", jnp.bfloat16))
    mask = _MASK64[: w.shape[0], : w.shape[1]]
    x = jnp.ones((2, 64), w.dtype)
    with pytest.raises(ValueError, match=message):
        nm_matmul(x, w, mask, packed=packed, transposable=changes.get("transposable", False))


def test_portable_implementations_accept_a_packed_weight():
    x = jnp.ones((2, 64), jnp.bfloat16)
    without = nm_matmul(x, _W64, _MASK64, transposable=True)
    packed = nm_matmul(x, _W64, _MASK64, transposable=True, packed=_pack())
    np.testing.assert_array_equal(without, packed)


def test_a_named_kernel_is_never_replaced():
    with pytest.raises(NotImplementedError, match="mosaic_sm90' needs a Hopper .*found 'cpu'"):
        _call(implementation="mosaic_sm90")


def test_the_whole_offending_group_is_named():
    mask = np.zeros((3, 8, 4), bool)
    check_nm_mask(mask, axis=0)
    mask[2, 4:7, 1] = True
    check_nm_mask(mask, axis=1)
    check_nm_mask(mask, axis=0, pattern=(3, 4))
    with pytest.raises(ValueError, match=r"column 1 keeps 3 of rows 4 to 7 of matrix \[2\]"):
        check_nm_mask(mask, axis=0)
    mask[1, 3, :] = True
    with pytest.raises(ValueError, match=r"row 3 keeps 4 of columns 0 to 3 of matrix \[1\]"):
        check_nm_mask(jnp.asarray(mask), axis=1)


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (np.zeros((8, 4), bool), {"axis": 2}, "axis must be 0 or 1, got axis=2"),
        (np.zeros((8, 4)), {"axis": 0}, r"mask must be bool\[..., K, N\], got float64\[8, 4\]"),
        (np.zeros(8, bool), {"axis": 0}, r"mask must be bool\[..., K, N\], got bool\[8\]"),
        (np.zeros((8, 6), bool), {"axis": 1}, r"N of mask .* multiple of 4 .*\(8, 6\)"),
        (np.zeros((6, 8), bool), {"axis": 0}, r"K of mask .* multiple of 4 .*\(6, 8\)"),
        (np.zeros((8, 4), bool), {"axis": 0, "pattern": (3, 2)}, r"pattern .*got \(3, 2\)"),
    ],
)
def test_a_mask_that_cannot_be_checked_is_refused(mask, options, message):
    with pytest.raises(ValueError, match=message):
        check_nm_mask(mask, **options)


def test_a_mask_that_is_not_looked_at_may_keep_everything():
    full = jnp.ones_like(_MASK)
    options = {"transposable": True, "check_mask": False}
    for name in (None, "xla", "reference"):
        got = nm_matmul(_X, _W, full, implementation=name, **options)
        np.testing.assert_array_equal(got, jnp.full((2, 12), 8.0))
    # Under jit its values are not known.
    np.testing.assert_array_equal(jax.jit(nm_matmul)(_X, _W, full), jnp.full((2, 12), 8.0))


def test_a_kernel_that_packs_the_weight_looks_at_its_mask_all_the_same():
    x, full = jnp.ones((2, 64), jnp.bfloat16), jnp.ones_like(_MASK64)
    options = {"check_mask": False, "implementation": "mosaic_sm90"}
    with hopper(), pytest.raises(ValueError, match="^mask must keep at most 2 of every 4"):
        nm_matmul(x, _W64, full, **options)
    rows = jnp.arange(64)[:, None] % 2 == jnp.zeros(128)
    with hopper(), pytest.raises(ValueError, match="transposable=True, but .* row 0 keeps 4"):
        nm_matmul(x, _W64, rows, transposable=True, **options)
