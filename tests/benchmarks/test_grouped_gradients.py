"""The benchmark of split gradients compares what it says."""

import jax
import pytest

from benchmarks import grouped_gradients
from benchmarks.grouped_gradients import BLOCK, HEAD_DIM, HEADS, KV_HEADS, make_gradient
from pallas_kernels import aot


@pytest.mark.slow
def test_one_function_splits_and_the_other_does_not():
    length = 512
    q, k = (
        jax.ShapeDtypeStruct((1, length, heads, HEAD_DIM), "bfloat16")
        for heads in (HEADS, KV_HEADS)
    )
    mask = jax.ShapeDtypeStruct((1, 1, length // BLOCK, length // BLOCK), bool)
    chosen, whole = (
        aot.compile_for(make_gradient("mosaic_sm90", whole=whole), q, k, k, q, mask)
        for whole in (False, True)
    )
    # Sums of dK and dV in f32, for each query head one.
    partial_sums_bytes = 2 * 4 * length * HEADS * HEAD_DIM
    assert chosen.temp_bytes - whole.temp_bytes > 0.9 * partial_sums_bytes


def test_without_a_gpu_it_says_so(capfd):
    assert grouped_gradients.main([]) == 2
    assert "found none" in capfd.readouterr().err
