"""A model small enough to compile in a second, its optimizer, batches and steps.

`make_step` and `make_state` compile once for each combination of arguments, in whichever test asks
first: recipes, models and optimizers are values, and those of this file are the same value for the
same changes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.models import SparsityMask, Transformer, TransformerConfig
from sparsejax.optimizer import Optimizer, OptimizerConfig, make_optimizer
from sparsejax.patterns import BlockPattern
from sparsejax.recipes import Phase, Recipe, set_attention_masks
from sparsejax.training.state import TrainState, create_train_state, make_graphdef, trainable
from sparsejax.training.step import make_train_step

VOCAB, LENGTH = 17, 16
SPARSE_ATTENTION = Recipe("sparse", (Phase("sparse", sparse_attention=True, pruned_logits="zero"),))


def make_config(**changes: Any) -> TransformerConfig:
    """Return a causal language model of two layers and two attention blocks."""
    settings = {
        "vocab_size": VOCAB,
        "num_layers": 2,
        "model_dim": 16,
        "num_heads": 2,
        "num_kv_heads": 2,
        "mlp_dim": 32,
        "max_length": LENGTH,
        "causal": True,
        "block": BlockPattern(block_q=8, block_kv=8),
    }
    return TransformerConfig(**settings | changes)


def make_optimizer_config(**changes: Any) -> OptimizerConfig:
    """Return AdamW at a constant rate of 0.01."""
    settings = {
        "name": "adamw",
        "learning_rate": 1e-2,
        "schedule": "constant",
        "warmup_fraction": 0.0,
        "final_fraction": 0.1,
        "weight_decay": 0.1,
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        "clip_norm": 1.0,
        "clip_value": None,
    }
    return OptimizerConfig(**settings | changes)


@functools.cache
def make_small_optimizer(*, num_steps: int = 100, **changes: Any) -> Optimizer:
    """Return the optimizer of `make_optimizer_config`, the same one for the same changes."""
    return make_optimizer(make_optimizer_config(**changes), num_steps=num_steps)


def make_batch(seed: int = 0, size: int = 4, *, length: int = LENGTH) -> dict[str, jax.Array]:
    """Return random tokens, each the target of the one before."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (size, length + 1), dtype=np.int32)
    return {
        "inputs": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "loss_weights": jnp.ones(size, jnp.float32),
    }


@functools.cache
def initialise_state(model: TransformerConfig, recipe: Recipe, optimizer: Optimizer) -> TrainState:
    """Return the state that a run begins with."""
    create = functools.partial(create_train_state, model, recipe, optimizer)
    return jax.jit(create)(jax.random.key(0))


@functools.cache
def make_state(model: TransformerConfig, recipe: Recipe, optimizer: Optimizer) -> TrainState:
    """Return a state of weights that NumPy draws: compiling an initialisation takes seconds."""
    abstract = nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))
    _, *variables = nnx.split(abstract, nnx.Param, SparsityMask)
    params, masks = (nnx.to_pure_dict(part) for part in variables)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.1, leaf.shape), leaf.dtype)

    params = jax.tree.map_with_path(draw, params)
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), masks)
    sparsity = jax.jit(recipe.init)(masks, params, jax.random.key(1))
    opt_state = optimizer.init(trainable(params, sparsity))
    return TrainState(
        step=jnp.int32(0),
        num_skipped=jnp.int32(0),
        params=params,
        sparsity=sparsity,
        opt_state=opt_state,
        key=jax.random.key(2),
    )


@functools.cache
def make_step(
    model: TransformerConfig, recipe: Recipe, optimizer: Optimizer, phase: int = 0, **options: Any
):
    """Return the jitted step of one phase."""
    return jax.jit(
        make_train_step(make_graphdef(model), recipe, recipe.phases[phase], optimizer, **options)
    )


def prune_attention(state: TrainState) -> TrainState:
    """Keep the diagonal of attention blocks and the one below it."""
    (mask,) = jax.tree.leaves(state.sparsity.masks)
    layers, *_, blocks, _ = mask.shape
    pattern = np.tri(blocks, dtype=bool) & ~np.tri(blocks, k=-2, dtype=bool)
    patterns = jnp.broadcast_to(pattern, (layers, blocks, blocks))
    masks = set_attention_masks(state.sparsity.masks, patterns)
    return dataclasses.replace(state, sparsity=dataclasses.replace(state.sparsity, masks=masks))


def assert_same(got: Any, expected: Any, **tolerance: float) -> None:
    """Compare all leaves of two trees, to the bit where no tolerance is given."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if tolerance:
            np.testing.assert_allclose(x, y, **tolerance)
        else:
            np.testing.assert_array_equal(x, y)
