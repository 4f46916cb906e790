"""Rung 2 itself: programs compiled for GPUs that are not there, and what is read from them."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.pallas.ops.gpu import hopper_matmul_mgpu

from pallas_kernels import aot, block_sparse_attention
from tests.tiers import tier

TARGETS = aot.TARGETS
N = 1024
X_NN = jax.ShapeDtypeStruct((N, N), jnp.bfloat16)
MATRIX_BYTES = 2 * N * N


@functools.cache
def report_matmul():
    tiles = hopper_matmul_mgpu.TuningConfig(tile_m=64, tile_n=64, tile_k=64, max_concurrent_steps=2)
    return aot.compile_for(lambda a, b: hopper_matmul_mgpu.matmul(a, b, None, tiles), X_NN, X_NN)


def spilling_kernel(x_gmem, y_gmem):
    """Carry three values of 128 registers each through a loop; a thread has 255."""

    def rotate(_, carry):
        a, b, c = carry
        return b + c, c, jnp.exp(a)

    y_gmem[...] = jax.lax.fori_loop(0, 9, rotate, (x_gmem[0], x_gmem[1], x_gmem[2]))[0]


def test_plain_jax_reports_the_memory_of_the_program():
    report = aot.compile_for(lambda x, w: jax.nn.gelu(x @ w).sum(), X_NN, X_NN)
    assert report.argument_bytes == 2 * MATRIX_BYTES
    assert report.output_bytes == 2  # one bf16
    cublas_workspace_bytes = 32 << 20
    assert 0 < report.temp_bytes <= 4 * MATRIX_BYTES + cublas_workspace_bytes
    assert report.peak_bytes == 2 * MATRIX_BYTES + 2 + report.temp_bytes
    assert report.kernels == () and report.count_collectives() == {}


def test_donated_memory_is_not_counted_twice():
    report = aot.compile_for(lambda x: x + 1, X_NN, donate_argnums=0)
    assert report.alias_bytes == MATRIX_BYTES and report.peak_bytes == MATRIX_BYTES


def test_mosaic_kernel_reports_what_ptxas_made_of_it():
    (kernel,) = report_matmul().kernels
    assert kernel.spill_bytes == 0 and kernel.stack_bytes == 0
    assert 0 < kernel.registers <= 255
    tile_bytes = 64 * 64 * 2
    assert 4 * tile_bytes < kernel.shared_memory_bytes <= aot.H200.shared_memory_per_block_bytes
    assert "wgmma.mma_async" in kernel.ptx and ".target sm_90a" in kernel.ptx.replace("\t", " ")
    assert "HGMMA" in kernel.sass


@pytest.mark.ci
def test_a_kernel_is_reported_each_time_it_is_compiled():
    again = report_matmul.__wrapped__()
    assert [kernel.registers for kernel in again.kernels] == [
        kernel.registers for kernel in report_matmul().kernels
    ]


@pytest.mark.ci
def test_spills_are_seen():
    kernel = plgpu.kernel(spilling_kernel, out_type=jax.ShapeDtypeStruct((64, 256), jnp.float32))
    report = aot.compile_for(kernel, jax.ShapeDtypeStruct((3, 64, 256), jnp.float32))
    assert report.kernels[0].spill_bytes > 0 and report.kernels[0].name.startswith("spilling")


def test_programs_for_the_machine_itself_are_still_kept(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        aot.compile_for(jnp.tanh, X_NN)
        assert not list(tmp_path.glob("*-cache"))
        jax.jit(lambda x: jnp.tanh(x) - 3)(jnp.ones(3)).block_until_ready()
        assert list(tmp_path.glob("*-cache"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def test_sharded_arguments_bring_collectives_and_smaller_shards():
    mesh = aot.make_gpu_mesh(axes={"data": 8, "model": 2}, hosts=2)
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    x = jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=sharding)
    report = aot.compile_for(lambda x: x.mean(axis=0), x, mesh=mesh)
    assert report.argument_bytes == 4 * N * N // 8
    assert report.count_collectives() == {"all-reduce": 1}


def test_the_function_finds_the_gpu_while_it_is_traced():
    seen = []

    def look(x):
        seen.append(jax.sharding.get_abstract_mesh().abstract_device.device_kind)
        return x

    for target in (aot.H100, aot.H200):
        aot.compile_for(look, X_NN, mesh=aot.make_gpu_mesh(target))
    assert seen == ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]


@pytest.mark.parametrize(
    "name",
    tier(
        {name: name for name in TARGETS},
        fast=["rtx4090"],
        slow={*TARGETS} - {"rtx4090", "a100", "b200", "h200"},
    ),
)
def test_programs_of_xla_compile_for_every_target(name):
    """A dense layer, and attention forward and backward."""

    def attend(q, k, v, mask):
        blocks = dict(block_q=64, block_kv=64, causal=True, implementation="xla")
        return block_sparse_attention(q, k, v, mask, **blocks).astype(jnp.float32).sum()

    mesh = aot.make_gpu_mesh(TARGETS[name])
    layer = aot.compile_for(lambda x, w: jax.nn.gelu(x @ w), X_NN, X_NN, mesh=mesh)
    assert layer.output_bytes == MATRIX_BYTES and "cublas" in layer.hlo
    q, mask = jax.ShapeDtypeStruct((1, 128, 2, 32), jnp.bfloat16), jnp.ones((1, 1, 2, 2), bool)
    attention = aot.compile_for(jax.grad(attend, (0, 1, 2)), q, q, q, mask, mesh=mesh)
    assert attention.temp_bytes > 0 and attention.kernels == ()


def test_targets_have_the_limits_of_their_compute_capability():
    # CUDA's table of compute capabilities: threads, float32 lanes and KiB of shared memory of one
    # multiprocessor, of which a block leaves one KiB.
    limits = {
        (8, 0): (2048, 64, 164),
        (8, 6): (1536, 128, 100),
        (8, 9): (1536, 128, 100),
        (9, 0): (2048, 128, 228),
        (10, 0): (2048, 128, 228),
        (12, 0): (1536, 128, 100),
    }
    for gpu in TARGETS.values():
        threads, fpus, shared = limits[gpu.compute_capability]
        assert (gpu.threads_per_core, gpu.fpus_per_core) == (threads, fpus), gpu.name
        assert gpu.shared_memory_per_core_bytes == shared << 10, gpu.name
        assert gpu.shared_memory_per_block_bytes == (shared - 1) << 10, gpu.name
        assert f"threads_per_core_limit: {threads}\n" in gpu.config()
        assert f"fpus_per_core: {fpus}\n" in gpu.config()


def test_uneven_hosts_are_refused():
    with pytest.raises(ValueError, match=r"hosts=3 and axes=\{'data': 8\}"):
        aot.make_gpu_mesh(axes={"data": 8}, hosts=3)


def test_a_missing_compiler_names_the_extra(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"jax_plugins.xla_cuda13.*sparsejax\[compile\]"):
        aot.compile_for(jnp.sin, X_NN)
