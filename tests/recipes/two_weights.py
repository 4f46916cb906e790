"""Recipes of dynamic sparse training on two stacked weights of two layers, and their update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.masks import count_kept, layer_densities
from sparsejax.patterns import Unstructured
from sparsejax.recipes import (
    MagnitudeConfig,
    MSTConfig,
    RigLConfig,
    SETConfig,
    StaticWeightsConfig,
    get_weight_masks,
    make_magnitude,
    make_mst,
    make_rigl,
    make_set,
    make_static_weights,
)

L, K, N = 2, 8, 12
NUM_STEPS, INTERVAL = 40, 3
SHAPES = {"mlp/up": (L, K, N), "mlp/down": (L, 2 * N, K)}
KNOWN = {"num_steps": NUM_STEPS, "patterns": dict.fromkeys(SHAPES, Unstructured())}
ATTENTION = {"block_size": 16, "length": 80, "causal": True}
OFTEN = {"update_interval_fraction": INTERVAL / NUM_STEPS}


@functools.cache
def mst(**changes):
    options = OFTEN | {"sparsity": 0.6, "warmup": 0.3, "restoration": 0.3, "stairs": 3}
    return make_mst(MSTConfig(**KNOWN | ATTENTION | options | changes))


@functools.cache
def rigl(**changes):
    return make_rigl(RigLConfig(**KNOWN | OFTEN | changes))


@functools.cache
def magnitude(**changes):
    return make_magnitude(MagnitudeConfig(**KNOWN | OFTEN | changes))


@functools.cache
def gradual_set(**changes):
    return make_set(SETConfig(**KNOWN | OFTEN | changes))


@functools.cache
def static_weights(**changes):
    return make_static_weights(StaticWeightsConfig(**KNOWN | changes))


def draw(seed):
    """Parameters, or gradients of them."""
    rng = np.random.default_rng(seed)

    def normal(shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    mlp = {name.removeprefix("mlp/"): {"kernel": normal(shape)} for name, shape in SHAPES.items()}
    mlp["up"]["bias"] = normal((L, N))
    return {"embedding": {"embedding": normal((5, K))}, "blocks": {"mlp": mlp}}


def full_masks():
    mlp = {
        name.removeprefix("mlp/"): {"kernel_mask": jnp.ones(shape, bool)}
        for name, shape in SHAPES.items()
    }
    attention = {"block_mask": jnp.ones((L, 1, 1, 5, 5), bool)}
    return {"blocks": {"attention": attention, "mlp": mlp}}


def begin(recipe, seed=0):
    params = draw(seed)
    return recipe.init(full_masks(), params, jax.random.key(seed)), params


def masks_of(sparsity):
    return jax.tree.map(np.asarray, get_weight_masks(sparsity.masks))


def kernels_of(params):
    mlp = params["blocks"]["mlp"]
    return {name: np.asarray(mlp[name.removeprefix("mlp/")]["kernel"]) for name in SHAPES}


@functools.cache
def make_update(recipe):
    """Return the jitted end of a step."""

    @jax.jit
    def update(sparsity, params, moments, grads, step):
        return recipe.update(
            sparsity,
            params,
            moments,
            {"model": grads, "recipe": {}},
            step=step,
            key=jax.random.fold_in(jax.random.key(7), step),
            phase=recipe.phases[0],
            learning_rate=0.1,
        )

    return update


def make_counts(sparsity, method="erdos_renyi"):
    """Return how many weights of each layer a sparsity leaves, as a method shares them out."""
    densities = layer_densities(SHAPES, density=1 - sparsity, method=method)
    return {name: int(count_kept(np.prod(SHAPES[name][1:]), densities[name])) for name in SHAPES}


def update_once(recipe, *, step=INTERVAL, moments=(), seed=0):
    sparsity, params = begin(recipe, seed)
    update = make_update(recipe)
    # The first step masks the weights, a later one changes the topology.
    sparsity, params, _ = update(sparsity, params, moments, draw(1), jnp.int32(0))
    grads = draw(2)
    after, new_params, moments = update(sparsity, params, moments, grads, jnp.int32(step))
    return masks_of(sparsity), masks_of(after), params, new_params, grads, moments
