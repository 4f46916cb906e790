"""The Triton kernels that pack and prune, interpreted: values, and what they make of their call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import pack_nm, prune_mvue
from pallas_kernels.doctor.oracles import make_nm_masks, make_normal
from pallas_kernels.nm_matmul.mvue import draw_bits, prune_drawn
from pallas_kernels.nm_matmul.packing import compress
from tests.kernels.test_mvue import GROUPS
from tests.kernels.triton_interpreter import run, triton_kernels
from tests.tiers import tier

VARIANTS = pytest.mark.parametrize("exact", [False, True], ids=["approximate", "exact"])
KEY = jax.random.key(5)

# Shape, axis, dtype: groups in one piece or apart, tiles that fit and that stand out.
CASES = {
    "last axis": ((3, 400), 1, "float32"),
    "behind": ((3, 8, 5), 1, "float32"),
    "first axis bf16": ((16, 1100), 0, "bfloat16"),
    "first axis whole tiles": ((64, 512), 0, "float32"),
    "last axis f16": ((2, 5, 12), -1, "float16"),
    "one column": ((8, 1), 0, "bfloat16"),
    "one group": ((4,), 0, "float32"),
    "narrow f16": ((128, 3), 0, "float16"),
}


def wild(shape, dtype, seed=0):
    """Draw values of all scales, zeros of either sign, groups of zeros, infinities and NaN."""
    rng = np.random.default_rng(seed)
    low, high = (-110, 120) if dtype != "float16" else (-24, 15)
    x = rng.standard_normal(shape) * 2.0 ** rng.integers(low, high, shape) ** rng.integers(0, 2)
    x *= rng.choice([1, 0, np.inf, np.nan], shape, p=[0.9, 0.08, 0.01, 0.01])
    x = np.where(rng.random(shape) < 0.05, rng.choice([1.0, -1.0], shape), x)
    return jnp.asarray(x, jnp.float32).astype(dtype)


def prune(x, key=KEY, **options):
    """Prune with the kernel."""
    with triton_kernels():
        return jax.jit(functools.partial(prune_mvue, implementation="triton", **options))(x, key)


def prune_one_by_one(x, key=KEY, *, axis, exact):
    """Prune with XLA on the CPU, where nothing is fused: every operation rounds by itself."""
    axis = range(x.ndim)[axis]
    with jax.default_device(jax.devices("cpu")[0]):
        plain = jax.jit(
            functools.partial(prune_drawn, axis=axis, exact=exact),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        return plain(jnp.asarray(np.asarray(x)), np.asarray(draw_bits(key, x.shape, axis)))


def assert_same(actual, expected):
    """Assert equal bits, but that one NaN is as good as another."""
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype == wanted.dtype
        got, wanted = (np.asarray(x.astype(jnp.float32)) for x in (got, wanted))
        np.testing.assert_array_equal(got, wanted)
        np.testing.assert_array_equal(np.signbit(got[got == 0]), np.signbit(wanted[wanted == 0]))


def count_launches(jaxpr):
    """Count the launches of a program: interpreted kernels, or calls of them on a GPU."""
    return sum(str(jaxpr).count(f"{name}[") for name in ("pure_callback", "triton_kernel_call"))


@VARIANTS
@pytest.mark.parametrize("case", tier(CASES, fast=["behind"]))
def test_pruning_has_the_bits_of_unfused_arithmetic(case, exact):
    shape, axis, dtype = case
    for x in (wild(shape, dtype), make_normal((shape,), dtype)[0]):
        actual = prune(x, axis=axis, exact=exact)
        assert_same(actual, prune_one_by_one(x, axis=axis, exact=exact))


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    axis=st.integers(0, 2),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    exact=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_has_the_bits_of_unfused_arithmetic(shape, axis, dtype, exact, seed):
    axis %= len(shape)
    shape[axis] *= 4
    x = wild(tuple(shape), dtype, seed)
    actual = prune(x, axis=axis, exact=exact)
    assert_same(actual, prune_one_by_one(x, axis=axis, exact=exact))


@pytest.mark.ci
@VARIANTS
def test_pruning_of_groups_that_sampling_could_get_wrong(exact):
    x = jnp.tile(jnp.array(list(GROUPS.values())), (40, 1))
    actual = prune(x, axis=-1, exact=exact)
    assert_same(actual, prune_one_by_one(x, axis=-1, exact=exact))
    assert (actual[1].reshape(-1, 4).sum(axis=1) == 2).all()


@pytest.mark.ci
@VARIANTS
def test_numbers_below_the_normal_ones_are_kept(exact):
    # Interpreted beside JAX, which flushes them to zero on a CPU.
    from pallas_kernels.nm_matmul.triton import prune_kernel

    x = np.float32(2.0**-140) * np.arange(1, 65, dtype=np.float32).reshape(4, 4, 4)
    bits = np.random.default_rng(0).integers(0, 2**32, (4, 4), dtype=np.uint32)
    outputs = {
        "pruned": jax.ShapeDtypeStruct(x.shape, np.float32),
        "kept": jax.ShapeDtypeStruct(x.shape, np.bool_),
    }
    constants = {"R": 4, "C": 4, "ROWS": 4, "COLUMNS": 4, "EXACT": exact}
    pruned, kept = run(prune_kernel.prune_mvue, 1, {"x": x, "bits": bits}, outputs, constants)
    wide = x.astype(np.float64)
    total = wide.sum(axis=1, keepdims=True)
    dominated = 2 * wide.max(axis=1, keepdims=True) >= total
    assert not dominated.any() and (kept.sum(axis=1) == 2).all()
    expected = np.broadcast_to(total / 2, x.shape) if exact else 2 * wide
    np.testing.assert_array_equal(pruned, np.where(kept, expected, 0))


@pytest.mark.ci
@VARIANTS
def test_pruning_batched_and_in_a_loop_is_pruning_one_by_one(exact):
    (x,) = make_normal(((3, 8, 6),), "float32")
    keys = jax.random.split(KEY, 3)
    one = functools.partial(prune_mvue, axis=0, exact=exact, implementation="triton")
    batched = jax.vmap(one, in_axes=(1, 0), out_axes=1)
    with triton_kernels():
        together = jax.jit(batched)(x.swapaxes(0, 1), keys)
        shared = jax.jit(jax.vmap(one, in_axes=(None, 0)))(x[0], keys)
        looped = jax.jit(lambda *a: jax.lax.map(lambda pair: one(*pair), a))(x, keys)
        jaxpr = jax.make_jaxpr(batched)(x.swapaxes(0, 1), keys)
    assert count_launches(jaxpr) == 1
    for i in range(3):
        alone = prune(x[i], keys[i], axis=0, exact=exact)
        assert_same([a[:, i] for a in together], alone)
        assert_same([a[i] for a in looped], alone)
        assert_same([a[i] for a in shared], prune(x[0], keys[i], axis=0, exact=exact))


@pytest.mark.ci
def test_packing_batched_and_in_a_loop_is_packing_one_by_one():
    (w,) = make_normal(((3, 64, 128),), "bfloat16")
    masks = jnp.stack([make_nm_masks((64, 128), (2, 4), seed=i)["underfull"] for i in range(3)])
    pack = functools.partial(pack_nm, axis=0, implementation="triton")
    with triton_kernels():
        together = jax.jit(jax.vmap(pack))(w, masks)
        shared = jax.jit(jax.vmap(pack, in_axes=(0, None)))(w, masks[0])
        looped = jax.jit(lambda *a: jax.lax.map(lambda x: pack(*x), a))(w, masks)
        jaxpr = jax.make_jaxpr(jax.vmap(pack))(w, masks)
    assert count_launches(jaxpr) == 1
    for got, mask in ((together, masks), (looped, masks), (shared, masks[:1].repeat(3, 0))):
        expected = pack_nm(w, mask, axis=0, implementation="xla")
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.ci
def test_derivatives_are_those_of_plain_jax():
    (x,), mask = make_normal(((64, 64),), "float32"), make_nm_masks((64, 64), (2, 4))["whole"]

    def pruned(x, implementation):
        return (prune_mvue(x, KEY, axis=0, implementation=implementation)[0] ** 3).sum()

    def packed(x, implementation):
        w = x.astype(jnp.bfloat16)
        return (pack_nm(w, mask, implementation=implementation).along_k.values ** 3).sum()

    for loss in (pruned, packed):
        with triton_kernels():
            got = jax.jit(jax.grad(functools.partial(loss, implementation="triton")))(x)
        expected = jax.jit(jax.grad(functools.partial(loss, implementation="xla")))(x)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
        assert jnp.abs(got).max() > 0


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((4, 4), jnp.int32), r"\('bfloat16', 'float16', 'float32'\), got int32"),
        (jnp.ones((4, 0)), r"takes arrays that are not empty, got \(4, 0\)"),
    ],
)
def test_what_the_kernel_does_not_prune_is_refused_with_the_reason(x, message):
    with triton_kernels(), pytest.raises(NotImplementedError, match=message):
        prune_mvue(x, KEY, axis=0, implementation="triton")


def test_packing_moves_the_bits_of_every_nan():
    # As bits, because XLA makes a quiet NaN of a signalling one.
    bits = jnp.arange(64 * 64, dtype=jnp.uint16).reshape(64, 64) * 16 + 15
    mask = jnp.asarray(make_nm_masks((64, 64), (2, 4), transposable=True)["underfull"])
    w = jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
    with triton_kernels():
        pack = jax.jit(functools.partial(pack_nm, implementation="triton", axis="both"))
        packed = pack(w, mask)
    for got, turn in ((packed.along_n, lambda x: x), (packed.along_k, jnp.transpose)):
        values, metadata = compress(turn(bits), turn(mask))
        np.testing.assert_array_equal(np.asarray(got.values).view(np.uint16), values)
        np.testing.assert_array_equal(got.metadata, metadata)
