"""The kernels of `nm_matmul` compiled for an H200 without one: sparse tensor cores, no spills."""

import collections
import re

import jax
import pytest

from pallas_kernels import aot, nm_matmul, pack_nm
from pallas_kernels.machine_code import parse
from pallas_kernels.nm_matmul.activations import activation_gradient
from pallas_kernels.nm_matmul.mosaic_sm90 import tile_config
from pallas_kernels.nm_matmul.mosaic_sm90.cut import Problem, Tiles
from pallas_kernels.nm_matmul.mosaic_sm90.kernel import multiply_sparse
from pallas_kernels.nm_matmul.mosaic_sm90.tile_config import default_config
from pallas_kernels.nm_matmul.packing import Compressed
from pallas_kernels.products_in_flight import find_loops
from tests.kernels.machine_checks import check_kernel
from tests.tiers import tier

NUM_PROCESSORS = 132


def _struct(shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def _compile(problem, tiles):
    sparse = Compressed(
        _struct((problem.rows, problem.contraction // 2), problem.dtype),
        _struct((problem.rows // 64, problem.contraction // 64, 128), "uint32"),
    )
    dense = (problem.columns, problem.contraction)
    dense = _struct(dense if problem.dense_is_transposed else dense[::-1], problem.dtype)
    bias = _struct((problem.rows,), problem.dtype) if problem.has_bias else None

    def multiply(sparse, dense, bias):
        return multiply_sparse(sparse, dense, bias, problem, tiles, num_programs=NUM_PROCESSORS)

    report = aot.compile_for(multiply, sparse, dense, bias)
    (kernel,) = report.kernels
    assert report.temp_bytes < 4096, "the product is one kernel and nothing besides"
    return kernel


def _check_product(problem, tiles):
    kernel = _compile(problem, tiles)
    check_kernel(kernel, in_flight_at_release=tiles.in_flight)
    # One instruction for 64 rows and 32 columns of the sparse operand.
    found = collections.Counter(re.findall(r"\bHGMMA\S*", kernel.sass))
    suffix = ".BF16" if problem.dtype == "bfloat16" else ""
    assert list(found) == [f"HGMMA.SP.64x{tiles.columns}x32.F32{suffix}"], found
    # A turn of the loop has a group for each step, and waits for all but those in flight.
    of_step, steps = tiles.blocks * tiles.contraction // 32, 1 + tiles.in_flight
    (loop,) = find_loops(parse(kernel.sass))
    assert loop.products == steps * of_step and loop.groups == steps, loop
    assert loop.waits == (tiles.in_flight,) * steps, loop
    # Half of the lanes supply metadata for every other instruction.
    selectors = re.findall(r"HGMMA\.SP.*, (0x[01])(?:, gsb0)? *$", kernel.sass, re.MULTILINE)
    halves = collections.Counter(selectors)
    assert set(halves) == {"0x0", "0x1"} and halves["0x0"] == halves["0x1"], halves
    # Operands are copied by the hardware, results are turned around on the way to memory.
    assert "UTMALDG" in kernel.sass and "UTMASTG" in kernel.sass
    assert re.search(r"STSM\S*MT88", kernel.sass), "results are not stored transposed"


# Whole transformers' products; every option of the kernel meets every tile it can have.
PRODUCTS = {
    "square": dict(rows=4096, contraction=4096, columns=4096),
    "square_f16": dict(rows=4096, contraction=4096, columns=4096, dtype="float16"),
    "gpt2_124m_up": dict(
        rows=3072, contraction=768, columns=16384, has_bias=True, activation="gelu",
        keeps_inputs=True,
    ),
    "gpt2_1558m_up": dict(
        rows=6400, contraction=1600, columns=16384, has_bias=True, activation="gelu"
    ),
    "gpt2_1558m_down": dict(rows=1600, contraction=6400, columns=16384, has_bias=True),
    "gpt2_1558m_dw": dict(rows=6400, contraction=16384, columns=1600, dense_is_transposed=False),
    "llama_up": dict(
        rows=2 * 14336, contraction=4096, columns=8192, activation="swiglu", keeps_inputs=True
    ),
    "llama_dw": dict(rows=28672, contraction=8192, columns=4096, dense_is_transposed=False),
    "geglu_bias": dict(
        rows=4096, contraction=1024, columns=8192, activation="geglu", has_bias=True,
        keeps_inputs=True,
    ),
    "small": dict(rows=1024, contraction=1024, columns=1024),
}  # fmt: skip


def _make_problem(product):
    defaults = {"dtype": "bfloat16", "dense_is_transposed": True}
    return Problem(**defaults | product)


@pytest.mark.parametrize(
    "product",
    tier(
        PRODUCTS,
        fast=["small"],
        slow=["square", "square_f16", "gpt2_124m_up", "gpt2_1558m_dw", "llama_dw"],
    ),
)
def test_products_of_transformers(product):
    problem = _make_problem(product)
    tiles = default_config(
        problem.rows,
        problem.contraction,
        problem.columns,
        problem.dtype,
        num_programs=NUM_PROCESSORS,
        activation=problem.activation,
    )
    _check_product(problem, tiles)


_TILES = [
    Tiles(blocks, columns, contraction, stages, cluster)
    for blocks in (1, 2)
    for columns in (256, 224, 192, 160, 128, 96, 64, 32)
    for contraction, stages in ((64, 3), (128, 2))
    for cluster in (1, 2)
    if columns <= {1: 256, 2: 192}[blocks]
    if (blocks, columns, cluster) not in tile_config._AVOIDED
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "contraction_outside", "gelu", "swiglu", "f16_geglu"])
@pytest.mark.parametrize("tiles", _TILES, ids=str)
def test_every_tile(tiles, kind):
    product = dict(rows=4096, contraction=4096, columns=tiles.columns * 12)
    if kind == "contraction_outside":
        product |= dict(dense_is_transposed=False)
    elif kind != "plain":
        dtype, name = ("float16", "geglu") if kind == "f16_geglu" else ("bfloat16", kind)
        product |= dict(activation=name, has_bias=True, keeps_inputs=True, dtype=dtype)
    problem = _make_problem(product)
    if problem.is_gated and tiles.blocks == 1:
        pytest.skip("value and gate are two blocks")
    if tiles.blocks * tiles.columns > tile_config.count_most_columns(problem.activation):
        pytest.skip("an activation needs registers")
    _check_product(problem, tiles)


@pytest.mark.ci
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_activations_take_an_exponential_and_no_tanh(activation):
    # The hardware's tanh errs by 2^-11, of which nothing is left where `1 + tanh` cancels.
    problem = _make_problem(dict(rows=256, contraction=128, columns=64, activation=activation))
    kernel = _compile(problem, Tiles(2, 64, 64, 2))
    check_kernel(kernel, in_flight_at_release=1)
    assert "MUFU.TANH" not in kernel.sass and "MUFU.EX2" in kernel.sass


@pytest.mark.ci
@pytest.mark.parametrize(
    ("num_steps", "in_flight"),
    [(1, 1), (2, 1), (5, 1), (1, 0), pytest.param(64, 0, marks=pytest.mark.slow)],
)
def test_few_steps_and_a_wait_for_every_group(num_steps, in_flight):
    problem = _make_problem(dict(rows=256, contraction=64 * num_steps, columns=256))
    kernel = _compile(problem, Tiles(1, 128, 64, 3, in_flight=in_flight))
    check_kernel(kernel, in_flight_at_release=in_flight)


@pytest.mark.ci
@pytest.mark.parametrize("axis", [0, 1, "both"])
def test_packing_is_one_kernel_that_reads_once(axis):
    def pack(w, mask):
        return pack_nm(w, mask, axis=axis, implementation="mosaic_sm90")

    report = aot.compile_for(pack, _struct((1600, 6400)), _struct((1600, 6400), bool))
    (kernel,) = report.kernels
    check_kernel(kernel)
    assert report.temp_bytes < 4096 and "fusion(" not in report.hlo
    # Eight rows of four by four blocks: one load of four values and one of four flags for each.
    loads = collections.Counter(re.findall(r"\bLDG\S*", kernel.sass))
    assert sum(loads.values()) == 16 and loads["LDG.E.64"] == 8, loads
    assert kernel.registers <= 128, "fewer than four programs share a processor"
    # Positions that other threads wrote are read behind a barrier.
    order = re.findall(r"\b(STS|BAR\.SYNC|LDS)\b", kernel.sass)
    between = order[len(order) - order[::-1].index("STS") : order.index("LDS")]
    assert "BAR.SYNC" in between, order


def _ffn(x, up, down, masks, d_out, *, activation, grad_pruning):
    key = None if grad_pruning == "none" else jax.random.key(0)
    options = dict(
        transposable=True, grad_pruning=grad_pruning, key=key, implementation="mosaic_sm90"
    )

    def apply(x, up, down):
        hidden = nm_matmul(x, up, masks[0], activation=activation, **options)
        return nm_matmul(hidden, down, masks[1], **options)

    y, back = jax.vjp(apply, x, up, down)
    return y, back(d_out)


@pytest.mark.slow
@pytest.mark.parametrize("grad_pruning", ["none", "mvue"])
def test_a_feed_forward_block_with_its_gradient(grad_pruning):
    tokens, width, hidden = 4096, 1024, 2816
    shapes = (width, 2 * hidden), (hidden, width)
    x = _struct((tokens, width))
    report = aot.compile_for(
        lambda *args: _ffn(*args, activation="swiglu", grad_pruning=grad_pruning),
        x, *map(_struct, shapes), [_struct(shape, bool) for shape in shapes], x,
    )  # fmt: skip
    for kernel in report.kernels:
        check_kernel(kernel, in_flight_at_release=1)
    count = collections.Counter(kernel.name.rsplit("_", 1)[0] for kernel in report.kernels)
    # Two layers: y and dx of each, and dw if pruned; packed once for both, and pruned gradients.
    pruned = 2 if grad_pruning == "mvue" else 0
    assert count == {"nm_matmul": 4 + pruned, "pack_nm": 2 + pruned}, count
    dense = re.findall(r'custom_call_target="__cublas\S*"', report.hlo)
    assert len(dense) == (0 if pruned else 2), "products left to cuBLAS: dw, unless pruned"


@pytest.mark.ci
@pytest.mark.parametrize("activation", ["gelu", "geglu", "swiglu"])
def test_the_gradient_of_an_activation_is_one_pass(activation):
    halves = 1 if activation == "gelu" else 2

    def gradient(z, d_out):
        return activation_gradient(z, d_out, activation)

    report = aot.compile_for(gradient, _struct((4096, halves * 2048)), _struct((4096, 2048)))
    assert report.temp_bytes < 4096, "something is written in between"
    assert len(re.findall(r" fusion\(", report.hlo[report.hlo.index("ENTRY") :])) == 1
