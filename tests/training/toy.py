"""A model of one table, and the train step on it with any recipe.

The optimizer is plain descent at rate 1, so that a difference of parameters is a gradient.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.models import ModelOutput, SparsityMask
from sparsejax.optimizer import Optimizer
from sparsejax.recipes import Phase, Recipe, Sparsity
from sparsejax.training.state import TrainState, trainable
from sparsejax.training.step import make_train_step

VOCAB, SCALE = 6, 1.5
MAPS = np.full((2, 4, 4), 0.25, np.float32)
BATCH = {
    "inputs": np.array([[0, 1, 2, 3], [4, 5, 0, 1]]),
    "targets": np.array([[1, 2, 3, 4], [5, 0, 1, 2]]),
    "loss_weights": np.ones(2, np.float32),
}
TABLE = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32)
PHASE = Phase("only", learning_rate="constant")
DESCENT = Optimizer(
    clip=lambda grads: grads,
    init=lambda params: {"updates": jnp.int32(0)},
    update=lambda grads, state, params, *, b1: (
        jax.tree.map(jnp.negative, grads),
        {"updates": state["updates"] + 1},
    ),
    schedule=lambda step: 0.1 * (step + 1.0),
    b1_schedule=lambda step: 0.0,
    base_learning_rate=1.0,
    base_b1=0.0,
    late_schedule=False,
)

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Bigram(nnx.Module):
    """Logits looked up by token, 0 where the mask prunes them.

    `note` is told what each traced call says of linear layers: options, and whether they draw.
    """

    def __init__(self, note=lambda linear_options, draws: None):
        self.note = note
        self.table = nnx.Param(jnp.zeros((VOCAB, VOCAB)))
        self.kept = SparsityMask(jnp.ones((VOCAB, VOCAB), bool))

    def __call__(
        self,
        tokens,
        *,
        decoder_tokens,
        mask,
        dropout_key,
        attention_options,
        linear_options,
        pruning_key,
        block_lists,
        probe,
    ):
        assert decoder_tokens is None
        self.note(linear_options, pruning_key is not None)
        logits = jnp.where(self.kept[...], self.table[...], 0.0)[tokens]
        return ModelOutput(logits, jnp.asarray(MAPS) if probe else None)


def make_graphdef(*note):
    return nnx.split(Bigram(*note), nnx.Param, SparsityMask)[0]


GRAPHDEF = make_graphdef()


def init(masks, params, key):
    del params, key
    return Sparsity(
        masks=masks,
        params={"scale": jnp.float32(SCALE), "sum_of_maps": jnp.float32(2)},
        statistics={"updates": jnp.int32(0)},
        phase_start_step=jnp.int32(0),
    )


def scale_params(params, sparsity, phase):
    return {"table": params["table"] * sparsity.params["scale"]}


def count_update(sparsity, params, opt_state, grads, *, step, key, phase, learning_rate):
    statistics = {"updates": sparsity.statistics["updates"] + 1}
    return dataclasses.replace(sparsity, statistics=statistics), params, opt_state


def make_recipe(*phases, **hooks):
    return Recipe(name="toy", phases=phases or (PHASE,), init=init, **hooks)


def make_state(recipe, step=0):
    params = {"table": jnp.asarray(TABLE)}
    sparsity = recipe.init({"kept": jnp.ones((VOCAB, VOCAB), bool)}, params, jax.random.key(1))
    return TrainState(
        step=jnp.int32(step),
        num_skipped=jnp.int32(0),
        params=params,
        sparsity=sparsity,
        opt_state=DESCENT.init(trainable(params, sparsity)),
        key=jax.random.key(2),
    )


def run_step(recipe, state=None, optimizer=DESCENT, phase=None):
    step = jit(make_train_step(GRAPHDEF, recipe, phase or recipe.phases[0], optimizer))
    return step(make_state(recipe) if state is None else state, BATCH)


def loss_and_gradient(table, weights=None):
    """Mean cross-entropy of the batch's tokens and its gradient by the table, in NumPy."""
    probabilities = np.exp(table) / np.exp(table).sum(-1, keepdims=True)
    inputs, targets = BATCH["inputs"].ravel(), BATCH["targets"].ravel()
    share = np.full(inputs.size, 1 / inputs.size)
    if weights is not None:
        share = weights.ravel() / weights.sum()
    gradient = np.zeros_like(table)
    np.add.at(gradient, inputs, share[:, None] * probabilities[inputs])
    np.add.at(gradient, (inputs, targets), -share)
    return -(share * np.log(probabilities[inputs, targets])).sum(), gradient


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
