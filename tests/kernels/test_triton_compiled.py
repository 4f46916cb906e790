"""What is reported of Triton kernels in a program that is compiled for an absent GPU.

All their configurations are compiled by `make compiled-report`, see
`tests/benchmarks/test_compiled_kernels.py`.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, block_sparse_attention

pytest.importorskip("jax_triton")


def test_a_kernel_reports_what_ptxas_made_of_it():
    gpu, (batch, length, heads, head_dim) = aot.TARGETS["rtx3090"], (2, 2048, 8, 64)
    q = jax.ShapeDtypeStruct((batch, length, heads, head_dim), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((1, 1, length // 64, length // 64), bool)

    def forward_and_backward(q, k, v, mask):
        def attend(q, k, v):
            return block_sparse_attention(
                q, k, v, mask, block_q=64, block_kv=64, implementation="triton"
            )

        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(jnp.ones_like(out))

    report = aot.compile_for(forward_and_backward, q, q, q, mask, mesh=aot.make_gpu_mesh(gpu))
    names = ("forward", "backward_queries", "backward_keys")
    assert [k.name for k in report.kernels] == [f"block_sparse_attention_{n}" for n in names]
    for kernel in report.kernels:
        assert 0 < kernel.registers <= 255 and kernel.remarks == ()
        assert kernel.spill_bytes == kernel.stack_bytes == 0
        assert 0 < kernel.shared_memory_bytes <= gpu.shared_memory_per_block_bytes
        assert ".target sm_86" in kernel.ptx and "LDGSTS" in kernel.sass
    # Tiles of 64 queries and 64 keys, 16 x 8 x 16 an instruction of one of four warps.
    assert report.kernels[0].sass.count("HMMA.16816") == 2 * 64 * 64 * 64 // (16 * 8 * 16) // 4
    # Queries, keys and values are read where they lie, and nothing is written that grows with the
    # square of the length.
    rows = batch * length * heads
    assert report.temp_bytes < 2 * rows * head_dim + 8 * 4 * rows + 2**20


@pytest.mark.ci
def test_kernels_inside_loops_are_reported_once():
    q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)

    def attend(q, _):
        return block_sparse_attention(
            q, q, q, None, block_q=64, block_kv=64, implementation="triton"
        ), None

    def loop(q):
        return jax.lax.scan(attend, q, None, length=3)[0] + jax.vmap(
            lambda q: attend(q[None], None)[0][0]
        )(q)

    mesh = aot.make_gpu_mesh(aot.TARGETS["l40s"])
    assert len(aot.compile_for(loop, q, mesh=mesh).kernels) == 1
