"""A method of one's own: Top-KAST, whose forward and backward passes keep different weights.

    python -m examples.own_recipe runs/top_kast

  forward    y = x (W * A)      A: the largest DENSITY of each weight matrix
  backward   dW * B             B: the largest DENSITY + EXPLORED, A among them
  decay      of A at the rate DECAY, of the rest of B at DECAY / DENSITY

Jayakumar et al., Top-KAST: Top-K Always Sparse Training, arXiv:2106.03517.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp

import sparsejax
from sparsejax.masks import magnitude_mask
from sparsejax.recipes import (
    Phase,
    Recipe,
    Sparsity,
    get_weight_masks,
    map_sparse_weights,
    map_weight_masks,
)

DENSITY, EXPLORED, DECAY, REFRESH_STEPS = 0.2, 0.2, 1e-2, 10


def choose(masks, params, density):
    """Keep the largest weights of each layer."""

    def keep_largest(name, mask, w):
        return jax.vmap(functools.partial(magnitude_mask, num_kept=round(density * w[0].size)))(w)

    return map_weight_masks(keep_largest, masks, params)


def refresh(sparsity, params):
    """Choose both sets anew."""
    return dataclasses.replace(
        sparsity,
        masks=choose(sparsity.masks, params, DENSITY),
        statistics={"trained": choose(sparsity.masks, params, DENSITY + EXPLORED)},
    )


def init(masks, params, key):
    """Begin with the largest of the first weights."""
    start = Sparsity(masks=masks, params={}, statistics={}, phase_start_step=jnp.int32(0))
    return refresh(start, params)


def mask_gradients(grads, sparsity, phase):
    """Train the weights of B."""

    def keep(name, trained, grad):
        return jnp.where(trained, grad, 0)

    model = map_sparse_weights(keep, sparsity.statistics["trained"], grads["model"])
    return grads | {"model": model}


def update(sparsity, params, opt_state, grads, *, step, key, phase, learning_rate):
    """Decay, and now and then choose anew."""
    kept = get_weight_masks(sparsity.masks)

    def decay(name, trained, w):
        return w - learning_rate * jnp.where(kept[name], DECAY, trained * DECAY / DENSITY) * w

    params = map_sparse_weights(decay, sparsity.statistics["trained"], params)
    is_due = (step + 1) % REFRESH_STEPS == 0
    sparsity = jax.lax.cond(is_due, lambda s: refresh(s, params), lambda s: s, sparsity)
    return sparsity, params, opt_state


def make_top_kast(facts):
    """Return the recipe, for the weights that `recipe.own.sparse_weights` names."""
    phase = Phase("sparse", sparse_weights=True, gradient_density=DENSITY + EXPLORED)
    return Recipe("top-kast", (phase,), init=init, mask_gradients=mask_gradients, update=update)


if __name__ == "__main__":
    from configs import spion_small

    config = spion_small.get_config()
    config.recipe.own.sparse_weights = "mlp/.*=unstructured"
    sparsejax.train(config, sys.argv[1], recipe=make_top_kast)
