"""The mean softmax map compiled for an H200 without one: one sum in registers, no maps of heads."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, machine_code, mean_attention_map
from tests.kernels.machine_checks import check_attention

B, T, N = 4, 2048, 8
MAPS_BYTES = 4 * B * N * T * T


def _compile(head_dim, *, length=T, group=1, kv_mask=False, lse=True, dtype="bfloat16", **options):
    arguments = {
        "q_BTNH": jax.ShapeDtypeStruct((B, length, N, head_dim), dtype),
        "k_BSKH": jax.ShapeDtypeStruct((B, length, N // group, head_dim), dtype),
    }
    if kv_mask:
        arguments["kv_mask_BS"] = jax.ShapeDtypeStruct((B, length), bool)
    if lse:
        arguments["lse"] = jax.ShapeDtypeStruct((B, length, N), jnp.float32)
    return aot.compile_for(lambda x: mean_attention_map(**x, **options), arguments)


def _check_kernel(kernel, **options):
    check_attention(kernel, **options)
    assert "UTMALDG" in kernel.sass, f"{kernel} copies no tiles"


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param({"head_dim": 32, "kv_mask": True}, marks=pytest.mark.slow),
        pytest.param({"head_dim": 64}, marks=pytest.mark.slow),
        pytest.param(
            {"head_dim": 64, "causal": True, "group": 4, "dtype": "float16"}, marks=pytest.mark.ci
        ),
        {"head_dim": 128, "causal": True, "kv_mask": True, "group": 2},
        # Of all, this one names most registers.
        pytest.param({"head_dim": 256, "kv_mask": True}, marks=pytest.mark.ci),
    ],
    ids=str,
)
def test_the_kernel(setting):
    report = _compile(**setting, implementation="mosaic_sm90")
    (kernel,) = report.kernels
    # The first half of a wide head is given back while the second is multiplied.
    _check_kernel(kernel, in_flight_at_release=int(setting["head_dim"] > 128))
    # 64 x 128 scores, 16 features an instruction.
    assert kernel.sass.count("HGMMA") == setting["head_dim"] // 16
    # The lse of all heads, and keys without what the mask removes.
    assert report.temp_bytes < MAPS_BYTES / 50


@pytest.mark.parametrize(
    "head_dim", [128, *(pytest.param(h, marks=pytest.mark.ci) for h in (32, 64, 256))]
)
def test_exponentials_are_taken_while_products_run(head_dim):
    (kernel,) = _compile(head_dim, implementation="mosaic_sm90").kernels
    bases = [x.base for x in machine_code.parse(kernel.sass).code]
    first = bases.index("HGMMA")
    waits = [
        i
        for i, x in enumerate(machine_code.parse(kernel.sass).code)
        if ".DEPBAR" in x.opcode and x.operands[1] == "0x0" and i > first
    ]
    # Of the 64 of a thread, the others being those of the last head.
    assert bases[first : waits[0]].count("MUFU") > 48


@pytest.mark.parametrize(
    ("length", "is_shared"),
    [(T, True), pytest.param(T - 128, False, marks=pytest.mark.ci)],
    ids=["even", "odd"],
)
def test_two_programs_share_keys_if_tiles_of_queries_are_even(length, is_shared):
    (kernel,) = _compile(64, length=length, kv_mask=True, implementation="mosaic_sm90").kernels
    _check_kernel(kernel)
    copies = [line for line in kernel.sass.splitlines() if "UTMALDG" in line]
    # Keys and their mask; queries and lse are a program's own.
    shared = [line for line in copies if ".MULTICAST" in line]
    assert 2 * len(shared) == len(copies) * is_shared


@pytest.mark.slow
def test_lse_comes_from_the_attention_kernel_when_it_is_not_given():
    report = _compile(64, lse=False, causal=True, implementation="mosaic_sm90")
    assert ["forward" in k.name or "mean" in k.name for k in report.kernels] == [True, True]
    for kernel in report.kernels:
        _check_kernel(kernel)
    assert report.temp_bytes < MAPS_BYTES / 20


@pytest.mark.ci
def test_an_unproven_kernel_is_not_chosen():
    report = _compile(64)
    assert not report.kernels
    # 64 MB of rows, as scores and as weights, not the maps of all heads.
    assert report.temp_bytes < MAPS_BYTES / 4
