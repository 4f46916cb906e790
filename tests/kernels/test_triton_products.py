"""The sparse products in Gluon: their compiled program, run instruction by instruction.

On a GPU they run as they are. Elsewhere the PTX for one is run, with copies that land as late, as
early, or as mixed as they may, and warps that run ahead of each other: whoever needs what has not
been waited for reads NaN, and accesses without a barrier between them raise.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.compiled_kernels import find_block_bytes
from pallas_kernels import nm_matmul, pack_nm
from pallas_kernels.doctor.oracles import make_normal
from pallas_kernels.nm_matmul.mvue import draw_bits, prune_drawn
from pallas_kernels.nm_matmul.packing import compress
from pallas_kernels.nm_matmul.triton import products, tiles
from pallas_kernels.nm_matmul.triton.pack import prune_and_pack
from pallas_kernels.triton.device import check_device
from tests.kernels import float64, nm_contract
from tests.kernels.nm_contract import NM_KERNEL_CASES, check_nm_case
from tests.kernels.test_triton_nm import count_launches
from tests.kernels.triton_interpreter import ptx_triton, triton_kernels
from tests.tiers import tier

ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
CONDITIONS = {
    "late": {"copies": "late", "order": "first"},
    "early": {"copies": "early", "order": "last"},
    "mixed": {"copies": "random", "order": "random"},
}
SMALL = tiles.SparseTile(64, 64, 2, 2, 2)
ON_GPU = jax.default_backend() == "gpu"
WITHOUT_GPU = pytest.mark.skipif(ON_GPU, reason="programs of other devices are run without a GPU")
# A GPU has conditions of its own.
WAYS = {"device": {}} if ON_GPU else CONDITIONS


def make_operands(rows, contraction, columns, dtype="bfloat16"):
    """Return a matrix [R, C], its 2:4 mask with every pair of positions, B [P, C] and a bias."""
    w, dense, bias = make_normal(((rows, contraction), (columns, contraction), (rows,)), dtype)
    rng = np.random.default_rng(1)
    order = rng.random((rows, contraction // 4, 4)).argsort(-1).argsort(-1)
    kept = order < 2
    assert len(np.unique(kept.reshape(-1, 4), axis=0)) == 6
    return w, jnp.asarray(kept.reshape(rows, contraction)), dense, bias


def check_product(cut, sizes, *, turned=False, splits=1, dtype="bfloat16", biased=False, **options):
    """Assert that one product has the values of float64, rounded once."""
    w, mask, dense, bias = make_operands(*sizes, dtype)
    count = functools.partial(lambda *_: splits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "count_splits", count)
        outs = products.multiply(
            compress(w, mask), dense.T if turned else dense, cut=cut,
            dense_is_transposed=not turned, bias=bias if biased else None, **options,
        )  # fmt: skip
    outs = [np.asarray(x).astype(np.float64) for x in outs]
    w, dense, bias = (
        np.asarray(x).astype(np.float64) for x in (jnp.where(mask, w, 0), dense, bias)
    )
    z = dense @ w.T + (bias if biased else 0)
    expected = [float64.activated(z, options.get("activation"))[0], z]
    for actual, wanted in zip(outs, expected, strict=False):
        np.testing.assert_allclose(actual, wanted, 1.1 * ROUNDING[dtype], 0.2 * ROUNDING[dtype])


def list_cuts():
    """List the tiles that tables of any device name, and what they are cut to."""
    rows = [row for c in tiles.CAPABILITIES for row in (tiles.find_row(tiles._TABLE, c),)]
    whole = {cut for row in rows for cut in (row.product, row.wide_product) if cut is not None}
    narrow = {row.product for row in rows}
    cut = {
        tiles.find_product_tile((8, 6), rows=r, columns=p, divides_columns=False)
        for r in (64, 128)
        for p in (64, 128)
    }
    return {str(x): x for x in sorted(whole | narrow | cut)}


CUTS = list_cuts()


@pytest.mark.parametrize(
    "case",
    tier(
        NM_KERNEL_CASES,
        fast=["bf16_mvue_odd_rows"],
        slow={*NM_KERNEL_CASES} - {"bf16_mvue_odd_rows", "f16_mvue_exact_swiglu", "bf16_geglu"},
    ),
)
def test_contract(case):
    with triton_kernels():
        check_nm_case(case, "triton")


@pytest.mark.ci
@pytest.mark.parametrize("name", ["bf16_mvue", "f16_mvue_exact_swiglu"])
def test_two_of_four_tokens_make_the_weight_gradient(name):
    with triton_kernels():
        nm_contract.check_pruned_gradient(NM_KERNEL_CASES[name], "triton")


@pytest.mark.ci
def test_bits_are_supplied_for_rows_that_are_appended():
    with triton_kernels():
        nm_contract.check_bits_of_a_key(NM_KERNEL_CASES["bf16_mvue_odd_rows"], "triton")


@pytest.mark.parametrize("turned", [False, True], ids=["plain", "turned"])
@pytest.mark.parametrize("cut", tier(CUTS, fast=(), slow={*CUTS} - {*list(CUTS)[::3]}))
def test_every_tile_whatever_is_slow(cut, turned):
    columns = cut.columns if turned else cut.columns + 5
    with triton_kernels():
        if ON_GPU and cut.shared_bytes > find_block_bytes(check_device()):
            pytest.skip("no device like this one has the tile")
        for conditions in WAYS.values():
            with ptx_triton.conditions(**conditions):
                check_product(cut, (cut.rows, 64 * (cut.stages + 2), columns), turned=turned)
        # Fewer steps than stages.
        check_product(cut, (2 * cut.rows, 64, columns), turned=turned)


@pytest.mark.parametrize("conditions", tier(WAYS, fast=[list(WAYS)[-1]]))
def test_parts_of_the_contraction(conditions):
    with triton_kernels(), ptx_triton.conditions(**conditions):
        # Seven steps in parts of three, three and one.
        check_product(SMALL, (64, 448, 128), turned=True, splits=3)


@WITHOUT_GPU
@pytest.mark.ci
@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("activation", [pytest.param(None, marks=pytest.mark.slow), "swiglu"])
def test_programs_of_newer_devices(capability, activation):
    with triton_kernels(capability):
        cut = tiles.find_product_tile(capability, rows=256, columns=70, divides_columns=False)
        options = {"activation": activation, "keeps_inputs": activation is not None}
        check_product(cut, (256, 192, 70), biased=True, **options)


@pytest.mark.ci
@pytest.mark.parametrize("activation", ["gelu", "geglu", "swiglu"])
@pytest.mark.parametrize(
    "dtype", tier({d: d for d in ROUNDING}, fast=["bfloat16"], slow=["float16"])
)
def test_bias_and_activation(activation, dtype):
    with triton_kernels():
        options = {"activation": activation, "keeps_inputs": True, "dtype": dtype}
        check_product(tiles._NARROW, (256, 128, 100), biased=True, **options)


@pytest.mark.parametrize(
    ("exact", "dtype"), [(False, "bfloat16"), pytest.param(True, "float16", marks=pytest.mark.ci)]
)
def test_a_gradient_is_pruned_and_packed_at_once(exact, dtype):
    (dz,) = make_normal(((128, 192),), dtype)
    dz = dz.at[:8].set(0).at[12, 3].set(-0.0)
    bits = draw_bits(jax.random.key(2), dz.shape, 0)
    with triton_kernels():
        actual = prune_and_pack(dz, bits, exact=exact)
    # On the CPU, where nothing is fused: every operation rounds by itself.
    with jax.default_device(jax.devices("cpu")[0]):
        prune = jax.jit(
            functools.partial(prune_drawn, axis=0, exact=exact),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        pruned = prune(jnp.asarray(np.asarray(dz)), np.asarray(bits))
        expected = compress(*(x.T for x in pruned))
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype == wanted.dtype
        unsigned = np.uint32 if got.dtype == jnp.uint32 else np.uint16
        np.testing.assert_array_equal(
            np.asarray(got).view(unsigned), np.asarray(wanted).view(unsigned)
        )


@pytest.mark.ci
def test_the_dense_product_for_comparison():
    a, _, b, _ = make_operands(128, 192, 70)
    with triton_kernels():
        out = products.multiply_dense(a, b, cut=tiles._NARROW)
    a, b, out = (np.asarray(x).astype(float) for x in (a, b, out))
    np.testing.assert_allclose(out, b @ a.T, 2.0**-8, 2.0**-8)


@pytest.mark.ci
def test_one_layout_serves_both_instructions():
    w, mask, x, _ = make_operands(128, 128, 40)
    w, mask = w.T, mask.T
    packed = pack_nm(w, mask, implementation="xla")
    with triton_kernels():
        y = nm_matmul(x, w, mask, packed=packed, implementation="triton")
    np.testing.assert_allclose(
        np.asarray(y).astype(float),
        np.asarray(x).astype(float) @ np.asarray(jnp.where(mask, w, 0)).astype(float),
        2.0**-8,
        2.0**-8,
    )


@pytest.mark.ci
def test_vmap_is_one_launch_and_shares_what_examples_share():
    w, mask, x, bias = make_operands(128, 64, 3 * 20)
    w, mask, x = w.T, mask.T, x.reshape(3, 20, 64)
    packed = pack_nm(w, mask, implementation="xla")

    def multiply(x, bias):
        return nm_matmul(x, w, mask, bias=bias, packed=packed, implementation="triton")

    biases = jnp.stack([bias, 2 * bias, -bias])
    with triton_kernels():
        run = jax.jit(jax.vmap(multiply))
        assert count_launches(jax.make_jaxpr(run)(x, biases)) == 1
        together = run(x, biases)
        apart = [multiply(*arrays) for arrays in zip(x, biases, strict=True)]
    np.testing.assert_array_equal(
        np.asarray(together, np.float32), np.asarray(jnp.stack(apart), np.float32)
    )


@pytest.mark.ci
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_derivative_of_the_gradient_is_refused(is_packed):
    w, mask, x, _ = make_operands(64, 64, 8)
    w, mask = w.T, mask.T
    packed = pack_nm(w, mask, implementation="xla") if is_packed else None

    def differentiate(w):
        def loss(w):
            y = nm_matmul(x, w, mask, packed=packed, implementation="triton")
            return (y.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss)(w)

    with triton_kernels():
        assert jnp.isfinite(differentiate(w)).all()
        with pytest.raises(NotImplementedError, match="'xla' has Hessian products"):
            jax.jvp(differentiate, (w,), (w,))


def test_offsets_that_32_bits_do_not_hold_are_refused():
    x = jax.ShapeDtypeStruct((2**25, 64), jnp.bfloat16)
    w, mask = (jax.ShapeDtypeStruct((64, 64), t) for t in (jnp.bfloat16, jnp.bool_))
    multiply = functools.partial(nm_matmul, implementation="triton")
    with triton_kernels(), pytest.raises(NotImplementedError, match="fewer than 33554432 tokens"):
        jax.eval_shape(multiply, x, w, mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, "'triton' takes bfloat16 and float16, got float32"),
        ({"pattern": (1, 4)}, r"'triton' takes pattern \(2, 4\), got \(1, 4\)"),
        (
            {"inner": 96},
            r"multiples of 64, and of 128 columns with a gate, got w.shape=\(96, 128\)",
        ),
        ({"columns": 192, "activation": "geglu"}, r"w.shape=\(128, 192\), activation='geglu'"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(changes, message):
    case = dataclasses.replace(NM_KERNEL_CASES["bf16"], **changes)
    x, w, _ = case.inputs()
    with triton_kernels(), pytest.raises(NotImplementedError, match=message):
        nm_matmul(x, w, case.masks()["whole"], implementation="triton", **case.options)
