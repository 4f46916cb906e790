"""The compiled kernels of `nm_matmul`, run instruction by instruction, against plain arithmetic.

These are the programs that a GPU would run: what JAX's interpreter leaves out is in them.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import nm_matmul, pack_nm, prune_mvue
from pallas_kernels.doctor.oracles import make_normal
from pallas_kernels.nm_matmul.mosaic_sm90.cut import Problem, Tiles
from pallas_kernels.nm_matmul.mosaic_sm90.kernel import multiply_sparse
from pallas_kernels.nm_matmul.mosaic_sm90.pack import pack_on_gpu, prune_on_gpu
from pallas_kernels.nm_matmul.packing import compress
from tests.kernels import float64, ptx_host
from tests.kernels.ptx_host import ptx_machine_runs_kernels
from tests.kernels.test_nm_packing import assert_same_bits, make_weight
from tests.tiers import tier


@pytest.mark.parametrize("axes", tier({x: x for x in ("k", "n", "kn")}, fast=(), slow=["k", "n"]))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_packing(axes, dtype):
    w, masks = make_weight((128, 192), transposable=True, dtype=dtype)
    w, mask = w.at[0, 0].set(-0.0).at[3, 5].set(jnp.nan), masks["underfull"]
    options = dict(along_k="k" in axes, along_n="n" in axes, interpreted=False)
    with ptx_machine_runs_kernels():
        actual = pack_on_gpu(w, mask, **options)
    along_k, along_n = compress(w.T, mask.T), compress(w, mask)
    assert_same_bits(actual, (along_k if "k" in axes else None, along_n if "n" in axes else None))


@pytest.mark.ci
@pytest.mark.parametrize(
    ("dtype", "exact"), [("bfloat16", False), pytest.param("float16", True, marks=pytest.mark.slow)]
)
def test_pruning(dtype, exact):
    (dz,) = make_normal(((128, 192),), dtype)
    dz, key = dz.at[:8].set(0), jax.random.key(2)
    pruned, mask = prune_mvue(dz, key, axis=0, exact=exact)
    with ptx_machine_runs_kernels():
        bits = jax.random.bits(key, (32, 192), jnp.uint32)
        actual = prune_on_gpu(dz, bits, exact=exact, interpreted=False)
    assert_same_bits(actual, compress(pruned.T, mask.T))


def make_operands(problem):
    """Return a random matrix [R, C], its 2:4 mask, the dense operand [P, C] and a bias."""
    rng = np.random.default_rng(1)
    shape = problem.rows, problem.contraction
    order = rng.random((shape[0], shape[1] // 4, 4)).argsort(axis=2).argsort(axis=2)
    normal = (
        jnp.asarray(rng.normal(size=size), problem.dtype)
        for size in (shape, (problem.columns, shape[1]), shape[:1])
    )
    w, dense, bias = normal
    return w, jnp.asarray((order < 2).reshape(shape)), dense, bias if problem.has_bias else None


def check_product(product, tiles, *, num_programs=2, **options):
    problem = Problem(**{"dtype": "bfloat16", "dense_is_transposed": True, "columns": 64} | product)
    w, mask, dense, bias = make_operands(problem)
    with ptx_machine_runs_kernels(**options):
        outs = multiply_sparse(
            compress(w, mask),
            dense if problem.dense_is_transposed else dense.T,
            bias, problem, Tiles(*tiles), num_programs=num_programs,
        )  # fmt: skip
        outs = [np.asarray(x).astype(np.float64) for x in outs]
    w, dense = (np.asarray(x).astype(np.float64) for x in (jnp.where(mask, w, 0), dense))
    z = dense @ w.T + (0 if bias is None else np.asarray(bias).astype(np.float64))
    expected = [float64.activated(z, problem.activation)[0], z][: len(outs)]
    rounding = 2.0 ** (-8 if problem.dtype == "bfloat16" else -11)
    for actual, wanted in zip(outs, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, 1.1 * rounding, 0.2 * rounding)


# Tiles are (blocks, columns, contraction, stages, cluster).
PRODUCTS = {
    "five steps": (dict(rows=256, contraction=320), (1, 32, 64, 3)),
    "many steps": (dict(rows=128, contraction=1536, columns=32), (1, 32, 64, 3)),
    "wide steps": (dict(rows=128, contraction=896, columns=32), (1, 32, 128, 2)),
    "contraction outside": (
        dict(rows=256, contraction=448, dense_is_transposed=False), (1, 64, 64, 3)),
    "contraction outside, 64 bytes": (
        dict(rows=256, contraction=384, dense_is_transposed=False, dtype="float16"),
        (1, 32, 128, 2)),
    "two tiles across": (
        dict(rows=128, contraction=192, columns=128, dense_is_transposed=False), (1, 128, 64, 2)),
    "partial last tile, bias and gelu": (
        dict(rows=320, contraction=640, has_bias=True, activation="gelu", keeps_inputs=True),
        (2, 64, 128, 2)),
    "swiglu": (
        dict(rows=256, contraction=320, has_bias=True, activation="swiglu", keeps_inputs=True),
        (2, 32, 64, 3)),
    "geglu of f16": (
        dict(rows=384, contraction=256, activation="geglu", dtype="float16"), (2, 32, 64, 3)),
    "one step": (dict(rows=128, contraction=64, columns=32), (1, 32, 64, 2)),
    "columns past the end": (
        dict(rows=128, contraction=192, columns=104), (1, 64, 64, 2)),
    "columns past the end, contraction outside, cluster": (
        dict(rows=256, contraction=192, columns=192, dense_is_transposed=False),
        (1, 128, 64, 2, 2)),
    "cluster": (dict(rows=512, contraction=320, columns=64), (1, 64, 64, 2, 2)),
    "cluster past the end, bias": (
        dict(rows=320, contraction=320, columns=64, has_bias=True), (1, 32, 64, 3, 2)),
    "cluster, contraction outside": (
        dict(rows=256, contraction=320, dense_is_transposed=False), (1, 64, 64, 2, 2)),
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    tier(
        PRODUCTS, fast=(), slow=set(PRODUCTS) - {"wide steps", "geglu of f16", "two tiles across"}
    ),
)
def test_products(case):
    check_product(*case, reads="late", copies="late")


@pytest.mark.slow
@pytest.mark.parametrize("case", PRODUCTS.values(), ids=PRODUCTS.keys())
@pytest.mark.parametrize(
    ("reads", "copies", "seed"),
    [("early", "early", 0), ("late", "early", 0), ("early", "late", 0),
     ("late", "random", 1), ("late", "random", 2)],
)  # fmt: skip
def test_products_whatever_is_slow(case, reads, copies, seed):
    check_product(*case, reads=reads, copies=copies, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("dense_is_transposed", [True, False])
@pytest.mark.parametrize(
    "tiles",
    [(blocks, columns, contraction, 2)
     for blocks, columns, contraction in itertools.product(
         (1, 2), (256, 224, 192, 160, 128, 96, 64, 32), (64, 128))
     if blocks * columns <= 256],
    ids=str,
)  # fmt: skip
def test_every_tile(tiles, dense_is_transposed):
    product = dict(rows=256, contraction=3 * tiles[2], columns=tiles[1])
    check_product(product | dict(dense_is_transposed=dense_is_transposed), tiles)


@pytest.mark.ci
def test_a_whole_layer():
    # Packing, y, dx and dw, the last of a pruned gradient, as a model calls them.
    x, w, dy = make_normal(((128, 64), (64, 128), (128, 128)), "bfloat16")
    mask = make_weight((64, 128), transposable=True)[1]["whole"]

    def run(implementation):
        packed = pack_nm(w, mask, axis="both", implementation=implementation)
        y, pull_back = jax.vjp(
            lambda x, w: nm_matmul(
                x, w, mask, packed=packed, transposable=True, grad_pruning="mvue",
                key=jax.random.key(0), implementation=implementation,
            ),
            x, w,
        )  # fmt: skip
        return jax.block_until_ready((y, *pull_back(dy)))

    with ptx_machine_runs_kernels():
        actual = run("mosaic_sm90")
    for a, e in zip(actual, run("xla"), strict=True):
        # One of 8192 sums of dx lies on the tie between two values: each backend takes another.
        a, e = (np.asarray(x).astype(np.float64) for x in (a, e))
        np.testing.assert_allclose(a, e, rtol=2.0**-7, atol=1e-4)


def _edit_ptx(monkeypatch, pattern, replacement):
    """Change the program that is run; fails if there is nothing to change."""
    compile_kernel = ptx_host.compile_kernel

    def edited(*args):
        ptx, log = compile_kernel(*args)
        ptx, count = re.subn(pattern, replacement, ptx)
        assert count, f"no {pattern} in the program"
        return ptx, log

    monkeypatch.setattr(ptx_host, "compile_kernel", edited)


@pytest.mark.ci
@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"wgmma\.wait_group\.sync\.aligned\s+\d", "wgmma.wait_group.sync.aligned 7"),
        (r"fence\.proxy\.async\.shared::cta;", ""),
        (r"(stmatrix\S*)\.trans", r"\1"),
        (r", 1, p, 1, 1, 0, 0;", ", 0, p, 1, 1, 0, 0;"),
        (r"mbarrier\.arrive\.release\.cta\.shared::cta\.b64 _, [^;]*;", ""),
    ],
    ids=["no wait", "no proxy fence", "not transposed", "one selector", "no slot is given back"],
)
def test_a_broken_program_is_noticed(monkeypatch, pattern, replacement):
    _check_that_a_broken_program_fails(
        monkeypatch,
        pattern,
        replacement,
        dict(rows=128, contraction=1536, columns=32),
        (1, 32, 64, 3),
    )


@pytest.mark.ci
@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"@\S+ mbarrier\.arrive\.shared::cluster\.b64 _, [^;]*;", ""),
        (r"(mov\.b16\s+%rs\d+), 3;", r"\1, 1;"),
        (r"(mapa\.shared::cluster\.u32 mapped_addr, \S+), [^;]*;", r"\1, 0;"),
    ],
    ids=["no slot is given back", "copied to one program", "given back to one program"],
)
def test_a_broken_cluster_is_noticed(monkeypatch, pattern, replacement):
    _check_that_a_broken_program_fails(
        monkeypatch, pattern, replacement, dict(rows=256, contraction=640), (1, 64, 64, 2, 2)
    )


def _check_that_a_broken_program_fails(monkeypatch, pattern, replacement, product, tiles):
    _edit_ptx(monkeypatch, pattern, replacement)
    with pytest.raises(
        (AssertionError, jax.errors.JaxRuntimeError), match="[Mm]ismatch|no thread|on their|arrival"
    ):
        check_product(product, tiles)
