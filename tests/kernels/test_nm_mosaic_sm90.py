"""The Hopper kernel of `nm_matmul`: interpreted, or on a GPU where there is one.

Under the interpreter one instruction is emulated, from the operands that it reads on a GPU, and
everything else runs: copies, ring, order of tiles, epilogue, stores, packing.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import nm_matmul, pack_nm
from pallas_kernels.doctor.oracles import error, make_nm_masks, make_normal
from pallas_kernels.hopper.budget import SHARED_MEMORY_BYTES
from pallas_kernels.nm_matmul.activations import apply_activation
from pallas_kernels.nm_matmul.mosaic_sm90 import tile_config
from pallas_kernels.nm_matmul.mosaic_sm90.cut import Cut, Problem, Tiles, count_shared_bytes
from pallas_kernels.nm_matmul.mosaic_sm90.kernel import multiply_sparse
from pallas_kernels.nm_matmul.mosaic_sm90.tile_config import default_config
from pallas_kernels.nm_matmul.packing import Compressed
from tests.kernels.interpreter import free_in_own_program, hopper, miss_barrier
from tests.kernels.nm_contract import NM_KERNEL_CASES, check_nm_case, check_pruned_gradient
from tests.tiers import tier

_CASES = {
    name: dataclasses.replace(
        case,
        inner=64,
        columns=64 if case.activation is None else 128,
        mask_names=("underfull",) if case.activation else case.mask_names,
    )
    for name, case in NM_KERNEL_CASES.items()
}


def packed_beforehand(x, w, mask, **options):
    """Multiply with a weight that XLA packed, to the same bits in a fraction of the time."""
    axis = "both" if options["transposable"] else 0
    packed = pack_nm(jax.lax.stop_gradient(w), mask, axis=axis, implementation="xla")
    return nm_matmul(x, w, mask, packed=packed, implementation="mosaic_sm90", **options)


@pytest.mark.ci
def test_contract_with_packing():
    case = dataclasses.replace(_CASES["bf16_geglu"], leading=(40,), has_bias=True)
    with hopper():
        check_nm_case(case, "mosaic_sm90", optimise=False)


@pytest.mark.parametrize(
    "case",
    tier(_CASES, fast=(), slow={*_CASES} - {"f16_mvue_exact_swiglu", "bf16_transposable_bias"}),
)
def test_contract(case):
    with hopper():
        check_nm_case(case, packed_beforehand, optimise=False)


@pytest.mark.ci
def test_two_of_four_tokens_make_the_weight_gradient():
    case = _CASES["bf16_mvue_odd_rows"]
    case = dataclasses.replace(case, leading=(50,), grad_pruning="mvue_exact")
    with hopper():
        check_pruned_gradient(case, packed_beforehand, optimise=False)


def make_operands(problem, *, seed=0):
    shape = (problem.columns, problem.contraction)
    dense_shape = shape if problem.dense_is_transposed else shape[::-1]
    a, dense, bias = make_normal(
        ((problem.rows, problem.contraction), dense_shape, (problem.rows,)),
        problem.dtype,
        seed=seed,
    )
    mask = jnp.asarray(make_nm_masks(a.T.shape, (2, 4), seed=seed)["underfull"].T)
    sparse = pack_nm(a, mask, axis=1).along_n
    return a, mask, sparse, dense, bias if problem.has_bias else None


def run(problem, tiles, sparse, dense, bias, *, num_programs=2):
    def multiply(sparse, dense, bias):
        return multiply_sparse(sparse, dense, bias, problem, tiles, num_programs=num_programs)

    return jax.jit(multiply)(sparse, dense, bias)


def check(problem, tiles, **options):
    a, mask, sparse, dense, bias = make_operands(problem)
    with hopper():
        out, *inputs = run(problem, tiles, sparse, dense, bias, **options)
    dense_CP = dense.T if problem.dense_is_transposed else dense
    f32 = functools.partial(jnp.asarray, dtype=jnp.float32)
    with jax.default_matmul_precision("highest"):
        z = (f32(jnp.where(mask, a, 0)) @ f32(dense_CP)).T
    z = z if bias is None else z + f32(bias)
    expected_results = [apply_activation(z, problem.activation)] + [z] * problem.keeps_inputs
    # Results are f32 sums of at most a few dozen values, rounded once.
    for got, expected in zip([out, *inputs], expected_results, strict=True):
        assert got.shape == expected.shape and got.dtype == jnp.dtype(problem.dtype)
        assert error(got, expected) <= 2.0**-8 * float(jnp.abs(expected).max())


_BASE = Problem(rows=128, contraction=128, columns=128, dtype="bfloat16", dense_is_transposed=True)
_change = functools.partial(dataclasses.replace, _BASE)

CUTS = {
    "one_step_a_tile": (_change(contraction=64), Tiles(1, 64, 64, 2)),
    "many_tiles_a_program": (_change(rows=256, columns=256), Tiles(1, 64, 64, 3)),
    "ring_longer_than_a_tile": (_change(rows=256), Tiles(1, 64, 64, 5)),
    "wide_steps": (_change(contraction=256), Tiles(1, 128, 128, 2)),
    "two_blocks": (_change(rows=256), Tiles(2, 64, 64, 3)),
    "last_tile_half_full": (_change(rows=192), Tiles(1, 64, 64, 2)),
    "last_tile_a_quarter_full": (_change(rows=320), Tiles(2, 64, 64, 2)),
    "tile_larger_than_the_rows": (_change(rows=128), Tiles(2, 64, 64, 2)),
    "narrow_tile": (_change(columns=96), Tiles(1, 96, 64, 2)),
    "contraction_outside": (_change(dense_is_transposed=False), Tiles(1, 128, 64, 2)),
    "contraction_outside_narrow": (
        _change(dense_is_transposed=False, columns=96, rows=192),
        Tiles(2, 96, 128, 2),
    ),
    "bias_gelu_f16": (
        _change(rows=192, has_bias=True, activation="gelu", dtype="float16", keeps_inputs=True),
        Tiles(1, 64, 64, 2),
    ),
    "geglu_half_full": (
        _change(rows=384, has_bias=True, activation="geglu", keeps_inputs=True),
        Tiles(2, 64, 64, 2),
    ),
    "swiglu": (_change(rows=256, activation="swiglu"), Tiles(2, 64, 64, 2)),
    "columns_past_the_end": (_change(columns=168), Tiles(1, 128, 64, 2)),
    "columns_past_the_end_contraction_outside": (
        _change(columns=192, dense_is_transposed=False),
        Tiles(1, 128, 64, 2),
    ),
    "cluster_columns_past_the_end": (
        _change(rows=320, columns=200, has_bias=True),
        Tiles(1, 128, 64, 2, cluster=2),
    ),
    "cluster": (_change(rows=512, contraction=256), Tiles(1, 64, 64, 3, cluster=2)),
    "cluster_past_the_end": (_change(rows=320, contraction=192), Tiles(1, 64, 64, 2, cluster=2)),
    "cluster_contraction_outside": (
        _change(rows=512, dense_is_transposed=False),
        Tiles(2, 64, 64, 2, cluster=2),
    ),
    "cluster_gated_half_full": (
        _change(rows=384, has_bias=True, activation="geglu", keeps_inputs=True),
        Tiles(2, 64, 64, 2, cluster=2),
    ),
}


@pytest.mark.parametrize(
    "cut",
    tier(
        CUTS,
        fast=(),
        slow=[
            "geglu_half_full",
            "many_tiles_a_program",
            "bias_gelu_f16",
            "wide_steps",
            "two_blocks",
        ],
    ),
)
def test_every_cut_gives_the_product(cut):
    check(*cut)


@pytest.mark.ci
@pytest.mark.parametrize("num_programs", [1, 3, 64])
def test_any_number_of_programs(num_programs):
    check(_change(rows=256), Tiles(1, 64, 64, 2), num_programs=num_programs)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("problem", "tiles"),
    [
        (_change(contraction=64 * 7), Tiles(1, 64, 64, 3)),
        pytest.param(
            _change(contraction=128 * 6, rows=256), Tiles(2, 128, 128, 2), marks=pytest.mark.slow
        ),
        pytest.param(
            _change(contraction=64 * 8, rows=512, activation="swiglu"),
            Tiles(2, 64, 64, 4),
            marks=pytest.mark.slow,
        ),
        (_change(contraction=64 * 5, rows=512), Tiles(1, 64, 64, 3, cluster=2)),
    ],
    ids=["odd_steps", "wide_steps", "gated", "cluster"],
)
def test_groups_in_flight_give_the_bits_of_a_kernel_that_waits_for_each(problem, tiles):
    # Masks that do not repeat along the contraction, and more steps than there are registers for
    # metadata: on a GPU this shows a register that is loaded while it is read.
    operands = make_operands(problem)[2:]
    with hopper("random"):
        overlapping = run(problem, tiles, *operands)
        waiting = run(problem, dataclasses.replace(tiles, in_flight=0), *operands)
    for x, y in zip(overlapping, waiting, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [1, 2])
def test_groups_in_flight_of_a_whole_device(cluster):
    # Every processor's queue of tensor-core instructions is full, tile after tile.
    size, tiles = 4096, Tiles(1, 256, 64, 4, cluster)
    problem = _change(rows=size, contraction=size, columns=size)
    operands = make_operands(problem)[2:]
    overlapping, waiting = (
        run(problem, dataclasses.replace(tiles, in_flight=n), *operands, num_programs=132)[0]
        for n in (1, 0)
    )
    np.testing.assert_array_equal(overlapping, waiting)


@pytest.mark.parametrize(("in_flight", "stages"), [(2, 4), (-1, 4), (1, 1)])
def test_tiles_that_give_back_a_slot_in_use_are_refused(in_flight, stages):
    with pytest.raises(ValueError, match=f"got in_flight={in_flight}, stages={stages}"):
        Tiles(1, 64, 64, stages, in_flight=in_flight)


@pytest.mark.ci
def test_repeat_is_bit_equal():
    problem, tiles = CUTS["geglu_half_full"]
    operands = make_operands(problem)[2:]
    with hopper():
        first, second = run(problem, tiles, *operands), run(problem, tiles, *operands)
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.ci
def test_packed_weights_serve_several_calls():
    (x, w) = make_normal(((2, 64, 64), (64, 64)), "bfloat16")
    mask = jnp.asarray(make_nm_masks((64, 64), (2, 4), transposable=True)["whole"])
    with hopper():
        packed = jax.jit(functools.partial(pack_nm, axis="both", implementation="mosaic_sm90"))(
            w, mask
        )

        @jax.jit
        def gradient(x, packed):
            def loss(x, w):
                y = nm_matmul(
                    x, w, mask, transposable=True, packed=packed, implementation="mosaic_sm90"
                )
                return (y.astype(jnp.float32) ** 2).sum()

            return jax.grad(loss, argnums=(0, 1))(x, w)

        got = [gradient(x[i], packed) for i in range(2)]
        # What was packed counts for y and dx; w itself would give another dx.
        halved = gradient(x[0], jax.tree.map(lambda a: a / 2 if a.dtype == w.dtype else a, packed))
    assert error(4 * halved[0], got[0][0]) < 0.02 * float(jnp.abs(got[0][0]).max())

    def dense_loss(x, w):
        return ((x @ jnp.where(mask, w, 0)).astype(jnp.float32) ** 2).sum()

    for i in range(2):
        expected = jax.grad(dense_loss)(x[i], w)
        assert error(got[i][0], expected) < 0.02 * float(jnp.abs(expected).max())


@pytest.mark.ci
def test_eager_vmap_and_scan_agree_with_jit():
    (x, w) = make_normal(((2, 64, 64), (2, 64, 64)), "bfloat16")
    mask = jnp.asarray(make_nm_masks((64, 64), (2, 4))["whole"])
    multiply = functools.partial(nm_matmul, implementation="mosaic_sm90")
    with hopper():
        one_by_one = jnp.stack([multiply(x[i], w[i], mask) for i in range(2)])
        together = jax.jit(jax.vmap(lambda x, w: multiply(x, w, mask)))(x, w)
        _, scanned = jax.lax.scan(lambda _, xw: (None, multiply(*xw, mask)), None, (x, w))
    np.testing.assert_array_equal(one_by_one, together)
    np.testing.assert_array_equal(one_by_one, scanned)


@pytest.mark.ci
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a missing barrier may hang a GPU")
@pytest.mark.parametrize("missing", [0, 2], ids=["slot_reused", "tile_read"])
def test_a_missing_barrier_is_noticed(missing, monkeypatch):
    # Barriers are awaited in the order: a slot that the copying warpgroup uses again, all slots at
    # its end, a tile of a computing one.
    miss_barrier(monkeypatch, missing)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        check(_change(contraction=256), Tiles(1, 64, 64, 2), num_programs=1)


@pytest.mark.ci
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a race may hang a GPU")
def test_a_slot_that_is_free_in_one_program_of_a_cluster_is_not_free(monkeypatch):
    free_in_own_program(monkeypatch)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        check(_change(rows=256, contraction=512), Tiles(1, 64, 64, 2, cluster=2))


@pytest.mark.ci
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a missing barrier may hang a GPU")
def test_programs_of_a_cluster_that_copy_different_tiles_are_noticed(monkeypatch):
    def locate_by_rank(cut, tile, rank):
        return locate(cut, (tile + rank) % cut.num_shared_tiles, rank)

    locate = Cut.locate
    monkeypatch.setattr(Cut, "locate", locate_by_rank)
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
        check(_change(rows=256), Tiles(1, 64, 64, 2, cluster=2))


@pytest.mark.ci
def test_contract_rejects_metadata_of_another_row(monkeypatch):
    case = _CASES["bf16"]

    def shifted(x, w, mask, **options):
        packed = pack_nm(w, mask)
        values, metadata = packed.along_k
        packed = dataclasses.replace(
            packed, along_k=Compressed(values, jnp.roll(metadata, 4, axis=-1))
        )
        return nm_matmul(x, w, mask, packed=packed, implementation="mosaic_sm90", **options)

    with pytest.raises(AssertionError, match="y off by"), hopper():
        check_nm_case(case, shifted)


_SHAPES = [
    *itertools.product((768, 1024, 1280, 1600, 4096), (3072, 6400, 14336), (1024, 16384)),
    *itertools.product((3072, 6400, 28672), (768, 1600, 4096), (192, 8192)),
    (64, 64, 32), (1024, 1024, 1024), (16384, 16384, 16384),
]  # fmt: skip


@pytest.mark.parametrize("activation", [None, "gelu", "swiglu"])
def test_chosen_tiles_fit(activation):
    for rows, contraction, columns in _SHAPES:
        tiles = default_config(
            rows, contraction, columns, "bfloat16", num_programs=132, activation=activation
        )
        problem = _change(rows=rows, contraction=contraction, columns=columns, has_bias=True)
        assert count_shared_bytes(problem, tiles) <= SHARED_MEMORY_BYTES
        assert tiles.stages >= 3 and contraction % tiles.contraction == 0
        assert tiles.columns <= columns
        assert tiles.columns % 32 == 0 and tiles.columns <= {1: 256, 2: 192}[tiles.blocks]
        assert activation is None or tiles.blocks * tiles.columns <= 256
        assert tiles.blocks == 2 or activation != "swiglu"
        assert (tiles.blocks, tiles.columns) != (2, 64), "ptxas splits its groups"
        assert (tiles.blocks, tiles.columns, tiles.cluster) != (1, 192, 2), "ptxas spills"


def test_tiles_keep_processors_busy():
    # 1024 x 1024 has 32 of the widest tiles; smaller ones give more of 132 processors work.
    tiles = default_config(1024, 1024, 1024, "bfloat16", num_programs=132)
    assert 64 <= (1024 // tiles.rows) * (1024 // tiles.columns) <= 132


@pytest.mark.parametrize("size", [4096, 8192])
def test_large_products_share_what_they_read_of_the_dense_operand(size):
    assert default_config(size, size, size, "bfloat16", num_programs=132).cluster == 2


def test_a_single_tile_of_rows_or_a_single_program_is_no_cluster():
    assert default_config(128, 4096, 4096, "bfloat16", num_programs=132).cluster == 1
    assert default_config(4096, 4096, 4096, "bfloat16", num_programs=1).cluster == 1


def test_a_measured_choice_comes_first(monkeypatch):
    measured = Tiles(2, 64, 64, 2)
    monkeypatch.setitem(tile_config.TUNED, (1024, 1024, 1024, False), measured)
    assert default_config(1024, 1024, 1024, "bfloat16", num_programs=132) == measured
    assert default_config(1024, 1024, 2048, "bfloat16", num_programs=132) != measured


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((64, 32), {}, r"multiples of 64, .* got w.shape=\(64, 32\)"),
        ((64, 64), {"activation": "geglu"}, "128 columns with a gate, .* activation='geglu'"),
        ((64, 64), {"dtype": "float32"}, "bfloat16 and float16, got float32"),
        ((64, 64), {"pattern": (1, 4)}, r"takes pattern \(2, 4\), got \(1, 4\)"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused_with_the_reason(shape, options, message):
    options = dict(options)
    dtype = options.pop("dtype", "bfloat16")
    x, w = make_normal(((8, shape[0]), shape), dtype)
    mask = jnp.asarray(make_nm_masks(shape, (1, 4))["whole"])
    with hopper(), pytest.raises(NotImplementedError, match=message):
        nm_matmul(x, w, mask, implementation="mosaic_sm90", **options)
