"""What models and recipes take from the kernels: padded lengths, patterns, maps that are probed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import aot, mean_attention_map
from pallas_kernels.doctor.oracles import error, make_normal
from sparsejax.masks import flood_fill, map_distance, map_skewness, pool_attention
from sparsejax.models import AttentionOptions, BlockSparseAttention, SparsityMask
from sparsejax.patterns import BlockPattern
from tests.kernels.contract import Case, call_implementation, compile_case
from tests.kernels.interpreter import hopper
from tests.kernels.machine_checks import check_attention
from tests.kernels.oracles import softmax_maps
from tests.small_models import make_config


@pytest.mark.slow
def test_flood_filled_pattern():
    case = Case(
        batch=1, num_heads=1, num_kv_heads=1, num_queries=256, num_keys=256, head_dim=64,
        block_q=64, block_kv=64, causal=True, pruned_logits="zero", dtype="bfloat16",
    )  # fmt: skip
    pooled = np.random.default_rng(0).random((4, 4), np.float32) + 3 * np.eye(4, dtype=np.float32)
    mask = flood_fill(jnp.asarray(pooled), quantile=0.5)[None, None]
    with hopper():
        attend = call_implementation("mosaic_sm90")
        got = compile_case(case, attend)(case.inputs(), mask)
    expected = compile_case(case, call_implementation("reference"))(case.inputs(), mask)
    assert max(error(x, y) for x, y in zip(got, expected, strict=True)) < 0.03


def _make_attention(width, heads, length, *, block, dtype):
    sizes = {"model_dim": width, "num_heads": heads, "num_kv_heads": heads, "max_length": length}
    pattern = BlockPattern(block_q=block, block_kv=block)
    config = make_config(**sizes, block=pattern, causal=False, dtype=dtype)
    return BlockSparseAttention(config, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_the_model_pads_a_length_between_blocks():
    real = jnp.arange(100) < jnp.array([[100], [70]])

    @functools.partial(jax.jit, static_argnames=("options", "dtype"))
    def run(kept, options, dtype):
        attention = _make_attention(64, 2, 128, block=64, dtype=dtype)
        graphdef, masks, params = nnx.split(attention, SparsityMask, nnx.Param)
        masks = jax.tree.map(lambda _: kept, masks)
        x, cotangent = make_normal(((2, 100, 64),) * 2, "bfloat16")

        def attend(params, x):
            return nnx.merge(graphdef, masks, params)(x, kv_mask_BT=real, options=options)[0]

        out, vjp = jax.vjp(attend, params, x.astype(dtype))
        return [y / jnp.abs(y).max() for y in jax.tree.leaves((out, vjp(cotangent.astype(dtype))))]

    everything = jnp.ones((1, 1, 2, 2), bool)
    pruned = everything.at[:, :, 0, 1].set(False)
    with hopper():
        options = AttentionOptions(implementation="mosaic_sm90")
        got = [run(kept, options, "bfloat16") for kept in (everything, pruned)]
    # Dense attention is not padded.
    dense, xla = AttentionOptions(sparse=False), AttentionOptions(implementation="xla")
    expected = run(everything, dense, "float32"), run(pruned, xla, "float32")
    for arrays in zip(got, expected, strict=True):
        assert max(error(x, y) for x, y in zip(*arrays, strict=True)) < 0.05


@pytest.mark.parametrize("causal", [False, True])
def test_what_recipes_read_of_the_map_is_what_the_maps_of_heads_have(causal):
    q, k, later_q = map(np.asarray, make_normal(((2, 32, 4, 8), (2, 32, 2, 8), (2, 32, 4, 8))))
    visible = np.tril(np.ones((2, 32, 32), bool)) if causal else np.ones((2, 32, 32), bool)
    average_maps = jax.jit(functools.partial(mean_attention_map, causal=causal))
    # GPUs would otherwise round f32 operands to TF32.
    with jax.default_matmul_precision("highest"):
        maps, later = (average_maps(x, k) for x in (q, later_q))
    heads, later_heads = (softmax_maps(x, k, visible) for x in (q, later_q))
    blocks = heads.reshape(2, 4, 4, 8, 4, 8).sum((3, 5)).mean((0, 1))
    pooled = pool_attention(maps, block_size=8, filter_size=None)
    np.testing.assert_allclose(64 * pooled, blocks, atol=1e-5)
    mean, later_mean = heads.mean((0, 1)), later_heads.mean((0, 1))
    spread = mean - mean.mean()
    skewness = (spread**3).mean() / (spread**2).mean() ** 1.5
    np.testing.assert_allclose(map_skewness(maps), skewness, rtol=1e-5)
    distance = np.linalg.norm(later_mean - mean)
    np.testing.assert_allclose(map_distance(maps, later), distance, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True])
def test_a_training_step_that_probes_runs_the_kernel_and_holds_no_maps_of_heads(sparse):
    B, T, N = 4, 2048, 8
    attention = _make_attention(64 * N, N, T, block=128, dtype="bfloat16")
    graphdef, state = nnx.split(attention)
    x = jax.ShapeDtypeStruct((B, T, 64 * N), jnp.bfloat16)
    options = AttentionOptions(sparse=sparse, implementation="mosaic_sm90")

    @functools.partial(jax.grad, has_aux=True, allow_int=True)
    def step(state, x):
        y, mean_map = jax.checkpoint(
            lambda state, x: nnx.merge(graphdef, state)(x, options=options, probe=True)
        )(state, x)
        return y.astype(jnp.float32).sum(), mean_map

    report = aot.compile_for(step, state, x)
    assert ["mean_attention_map" in k.name for k in report.kernels].count(True) == 1
    assert ["attention_forward" in k.name for k in report.kernels].count(True) == 1 + sparse
    for kernel in report.kernels:
        check_attention(kernel)
    # The dense attention of a recipe's first phase, whatever is named, holds maps of its own.
    if sparse:
        assert report.temp_bytes < 4 * B * N * T * T / 4
