"""The whole train step, compiled for an H200 on a machine without one."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.fst_gpt2_memory import compile_step
from pallas_kernels import aot
from sparsejax.patterns import BlockPattern
from sparsejax.recipes import Phase, Recipe
from sparsejax.training.state import make_abstract_state, make_graphdef
from sparsejax.training.step import make_train_step
from tests.small_models import make_config, make_small_optimizer

pytestmark = pytest.mark.ci

_MODEL = make_config(
    vocab_size=256,
    model_dim=128,
    num_heads=4,
    num_kv_heads=4,
    mlp_dim=512,
    max_length=4096,
    dtype="bfloat16",
    block=BlockPattern(block_q=64, block_kv=64),
)
_OPTIMIZER = make_small_optimizer()


@functools.cache
def _compile(sparse, num_devices=1, implementation="xla"):
    phase = Phase("phase", sparse_attention=sparse, pruned_logits="zero" if sparse else "masked")
    recipe = Recipe("recipe", (phase,))
    mesh = aot.make_gpu_mesh(axes={"data": num_devices})
    replicated, split = (NamedSharding(mesh, PartitionSpec(*a)) for a in ((), ("data",)))
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
        make_abstract_state(_MODEL, recipe, _OPTIMIZER, "phase"),
    )
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=split)
        for name, shape, dtype in [
            ("inputs", (4, 4096), jnp.int32),
            ("targets", (4, 4096), jnp.int32),
            ("loss_weights", (4,), jnp.float32),
        ]
    }
    step = make_train_step(
        make_graphdef(_MODEL), recipe, phase, _OPTIMIZER, implementation=implementation
    )
    return aot.compile_for(step, state, batch, mesh=mesh, donate_argnums=0)


@pytest.mark.slow
def test_train_step_compiles_for_an_h200_and_fits():
    report = _compile(sparse=True)
    assert 0 < report.peak_bytes < aot.H200.memory_bytes
    # Donation: parameters, moments and masks are updated in place.
    assert report.alias_bytes > 0.9 * report.argument_bytes


def test_sparse_step_does_not_hold_the_square_of_the_length():
    # One layer's logits of the batch, in bfloat16, are a quarter of this.
    one_map_bytes = 4 * 4 * 4096 * 4096 * 2
    assert _compile(sparse=True).temp_bytes < one_map_bytes < _compile(sparse=False).temp_bytes


def test_the_hopper_kernels_are_in_the_step_of_all_layers():
    report = _compile(sparse=True, implementation="mosaic_sm90")
    # Layers are scanned over: one kernel forward and two backward, however many layers there are.
    assert len(report.kernels) == 3
    assert all(kernel.spill_bytes == 0 for kernel in report.kernels)
    assert report.temp_bytes < 1.1 * _compile(sparse=True).temp_bytes


def test_the_step_of_fst_runs_on_sparse_tensor_cores():
    mesh = aot.make_gpu_mesh(aot.H200)
    report = compile_step("774m", mesh, sparse=True, num_layers=2)
    assert not [k.name for k in report.kernels if k.spill_bytes or k.is_serialized]
    products = [k for k in report.kernels if "HGMMA.SP" in k.sass]
    # Forward and again for the backward pass: up, down; backward: dx and dW of both.
    assert len(products) >= 6
    assert len([k for k in report.kernels if k.name.startswith("pack_nm")]) >= 2
    assert report.alias_bytes > 0.99 * report.output_bytes


@pytest.mark.slow
def test_step_on_two_gpus_reduces_gradients_over_the_batch():
    report = _compile(sparse=False, num_devices=2)
    assert report.count_collectives().get("all-reduce", 0) > 0
