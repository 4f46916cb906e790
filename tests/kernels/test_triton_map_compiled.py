"""The Triton kernels of the mean map compiled for an absent GPU: what they hold and compute.

All their configurations are compiled by `make compiled-report`, see
`tests/benchmarks/test_compiled_kernels.py`.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, mean_attention_map

pytest.importorskip("jax_triton")


@pytest.mark.ci
def test_no_map_of_a_head_is_written_and_tensor_cores_do_the_products():
    batch, length, heads, head_dim = 2, 2048, 8, 64
    q, k = (jax.ShapeDtypeStruct((batch, length, n, head_dim), jnp.bfloat16) for n in (heads, 4))

    def average(q, k):
        return mean_attention_map(q, k, implementation="triton")

    report = aot.compile_for(average, q, k, mesh=aot.make_gpu_mesh(aot.TARGETS["rtx3090"]))
    lse, mean = report.kernels
    assert (lse.name, mean.name) == ("attention_log_sum_exp", "mean_attention_map")
    # Tiles of 128 x 64 and 128 x 128, 64 channels, 16 x 8 x 16 an instruction of one of 8 warps.
    assert lse.sass.count("HMMA.16816") == 128 * 64 * 64 // (16 * 8 * 16) // 8
    assert mean.sass.count("HMMA.16816") == 128 * 128 * 64 // (16 * 8 * 16) // 8
    assert report.temp_bytes < 4 * batch * heads * length + 4 * length**2 + 2**20
