"""The Triton kernels of the mean map compiled for absent GPUs: no spills, tensor cores, memory."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, mean_attention_map
from pallas_kernels.attention_map.call import MapFacts
from pallas_kernels.attention_map.triton.tiles import CAPABILITIES

pytest.importorskip("jax_triton")

_B, _N, _K = 2, 8, 4
# A target of each compute capability; the H200 stands for 9.0, the L40S for 8.9.
TARGETS = ("a100", "rtx3090", "l40s", "h200", "b200", "rtx5090")
# What tensor cores of a family are called in machine code.
_TENSOR_CORES = {8: ("HMMA",), 9: ("HGMMA", "HMMA"), 10: ("UTCHMMA", "HMMA"), 12: ("HMMA",)}

_PLAIN = MapFacts(
    num_queries=2048, num_keys=2048, head_dim=64, dtype="bfloat16", causal=False
)  # fmt: skip
# Every mask, and lengths that end inside a tile.
_CUT = dataclasses.replace(_PLAIN, num_queries=2000, num_keys=1990, causal=True, has_kv_mask=True)
CALLS = [
    *(
        dataclasses.replace(facts, dtype=dtype, head_dim=head_dim)
        for dtype, head_dims in (
            ("bfloat16", (16, 32, 64, 80, 128, 256)),
            ("float16", (64, 128)),
            ("float32", (64, 128, 256)),
        )
        for head_dim in head_dims
        for facts in (_PLAIN, _CUT)
    ),
    # So few tiles that heads are divided.
    dataclasses.replace(_CUT, num_queries=512, num_keys=512, has_lse=True),
]
"""Facts of the calls that are compiled: every row of the table, with masks and without."""

_CI = [
    facts
    for facts in CALLS
    if facts.head_dim in (64, 128, 256) and facts.causal and facts.dtype != "float16"
]


def _name(facts):
    flags = [n for n in ("causal", "has_kv_mask", "has_lse") if getattr(facts, n)]
    lengths = f"{facts.num_queries}x{facts.num_keys}"
    return "-".join([f"h{facts.head_dim}", facts.dtype, lengths, *flags])


def _compile(facts, target):
    arrays = {
        "q_BTNH": jax.ShapeDtypeStruct((_B, facts.num_queries, _N, facts.head_dim), facts.dtype),
        "k_BSKH": jax.ShapeDtypeStruct((_B, facts.num_keys, _K, facts.head_dim), facts.dtype),
    }
    if facts.has_kv_mask:
        arrays["kv_mask_BS"] = jax.ShapeDtypeStruct((_B, facts.num_keys), bool)
    if facts.has_lse:
        arrays["lse"] = jax.ShapeDtypeStruct((_B, facts.num_queries, _N), jnp.float32)

    def average(arrays):
        return mean_attention_map(**arrays, causal=facts.causal, implementation="triton")

    return aot.compile_for(average, arrays, mesh=aot.make_gpu_mesh(aot.TARGETS[target]))


def _find_faults(kernel, gpu, facts):
    faults = []
    if kernel.spill_bytes or kernel.stack_bytes:
        faults.append(f"spills {kernel.spill_bytes} bytes, stack {kernel.stack_bytes}")
    if kernel.shared_memory_bytes > gpu.shared_memory_per_block_bytes:
        faults.append(f"{kernel.shared_memory_bytes} bytes of shared memory")
    major, minor = gpu.compute_capability
    if f".target sm_{major}{minor}" not in kernel.ptx.replace("\t", " "):
        faults.append("compiled for another device")
    if facts.dtype != "float32" and not any(x in kernel.sass for x in _TENSOR_CORES[major]):
        faults.append(f"none of {_TENSOR_CORES[major]}")
    if "LDGSTS" not in kernel.sass:
        faults.append("no tile is copied ahead")
    return [f"{kernel.name}: {fault}" for fault in faults]


def _check(facts, target):
    gpu, report = aot.TARGETS[target], _compile(facts, target)
    names = ["attention_log_sum_exp", "mean_attention_map"][facts.has_lse :]
    assert [kernel.name for kernel in report.kernels] == names
    faults = [fault for k in report.kernels for fault in _find_faults(k, gpu, facts)]
    assert not faults, f"{facts} on {gpu.name}:\n" + "\n".join(faults)
    return report


@pytest.mark.ci
def test_no_map_of_a_head_is_written_and_tensor_cores_do_the_products():
    lse, mean = (report := _check(_PLAIN, "rtx3090")).kernels
    # Tiles of 128 x 64 and 128 x 128, 64 channels, 16 x 8 x 16 an instruction of one of 8 warps.
    assert lse.sass.count("HMMA.16816") == 128 * 64 * 64 // (16 * 8 * 16) // 8
    assert mean.sass.count("HMMA.16816") == 128 * 128 * 64 // (16 * 8 * 16) // 8
    assert report.temp_bytes < 4 * _B * _N * _PLAIN.num_queries + 4 * 2048**2 + 2**20


@pytest.mark.ci
@pytest.mark.parametrize("target", ["a100", "rtx5090"])
@pytest.mark.parametrize("facts", _CI, ids=_name)
def test_tiles_compile_without_spills(facts, target):
    _check(facts, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("facts", CALLS, ids=_name)
def test_every_call_compiles_without_spills(facts, target):
    _check(facts, target)


def test_every_row_of_the_table_has_a_target():
    assert {aot.TARGETS[name].compute_capability for name in TARGETS} == set(CAPABILITIES)
