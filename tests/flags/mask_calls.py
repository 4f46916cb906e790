"""Functions that make masks of arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import masks

_RNG = np.random.default_rng(0)
_W, _GRAD = (_RNG.standard_normal((8, 8)).astype(np.float32) for _ in range(2))
_STACK = _RNG.standard_normal((3, 8, 8)).astype(np.float32)
_MAPS = _RNG.random((3, 16, 16), np.float32)
_POOLED = _RNG.random((3, 4, 4), np.float32)
_MASK = _RNG.random((8, 8)) < 0.5
_SEED, _STEP = np.uint32(0), np.int32(3)
_SCHEDULE = masks.SparsitySchedule(
    num_steps=12,
    ramps=(
        masks.Ramp(start_step=1, end_step=5, sparsity=0.8, shape="cubic"),
        masks.Ramp(start_step=6, end_step=10, sparsity=0.2, stairs=3),
    ),
)
_ANNEALING = masks.CosineAnnealing(
    num_steps=12, phases=(masks.AnnealingPhase(start_step=0, end_step=8),)
)
_UPDATES = masks.UpdateSteps(interval=2, end_step=9)


def _fixed_patterns(seed):
    key = jax.random.key(seed)
    return [
        masks.bigbird(8, width=1, num_global=1, num_random=1, key=key, causal=True),
        masks.hybrid_mask(16, stride=4),
        *(masks.pattern_at_density(n, 8, density=0.5, key=key) for n in masks.FIXED_PATTERNS),
    ]


def _spion(maps):
    variants = {"cf": None, "c": 0.75, "f": None}
    return [
        masks.spion_pattern(
            maps, block_size=4, quantile=0.5, filter_size=3, variant=name, density=density,
            causal=causal,
        )
        for name, density in variants.items()
        for causal in (False, True)
    ]  # fmt: skip


def _flood(pooled):
    return [
        (
            masks.flood_fill(pooled, density=0.7, causal=causal, walk=walk),
            masks.flood_reach(pooled, causal=causal, walk=walk),
        )
        for causal in (False, True)
        for walk in ("greedy", "flood")
    ] + [masks.top_k_blocks(pooled, density=0.7, exact=True)]


def _sat(weights, maps):
    pattern = masks.sat_pattern(weights, density=0.7, causal=True)
    return pattern, masks.map_skewness(maps), masks.map_distance(maps, 2 * maps)


def _drop_and_grow(w, grad, mask, seed):
    options = {"weight": w, "grad": grad, "num_drop": 5, "key": jax.random.key(seed)}
    by_groups = masks.magnitude_nm_mask(w, axis=0)
    return [
        (
            masks.drop_and_grow(mask, num_grow=6, growth=growth, **options),
            masks.drop_and_grow_nm(by_groups, n=2, m=4, growth=growth, **options),
        )
        for growth in ("gradient", "random", "mixed")
    ]


def _select(w, mask, seed):
    draws = masks.random_mask(jax.random.key(seed), w.shape, 5, among=mask)
    return draws, masks.magnitude_mask(w, 5, among=mask), masks.transposable_mask(w)


def _soft_threshold(w):
    def loss(w):
        beta = masks.soft_threshold_scale(w, axis=-2)
        return masks.soft_threshold_ste(w, beta, axis=-2).sum()

    return jax.grad(loss)(w), masks.soft_threshold_mask(w, axis=-2)


def _topology(w, mask):
    return (
        masks.apply_topology(w, mask, ~mask),
        masks.reset_moments(w, mask, ~mask, rule="mean"),
        masks.masked_decay(w, mask, 0.1),
        masks.expand_mask(mask, (16, 32)),
        masks.block_scores(w, (2, 4)),
        masks.retained_l1(w, mask),
        masks.flip_rate(mask, ~mask),
    )


def _schedules(step):
    density = _SCHEDULE.density(step)
    return (
        _ANNEALING.fraction(step),
        _UPDATES.due(step),
        masks.layer_densities_at(density, {"up": (3, 8, 16), "down": (3, 16, 8)}, method="uniform"),
        masks.update_counts(jnp.int32(500), size=1000, density=density, update_fraction=0.3),
    )


MASK_CALLS = {
    "fixed patterns": (_fixed_patterns, (_SEED,)),
    "SPION": (_spion, (_MAPS,)),
    "flood fill": (_flood, (_POOLED,)),
    "SAT": (_sat, (_POOLED, _MAPS)),
    "drop and grow": (_drop_and_grow, (_W, _GRAD, _MASK, _SEED)),
    "selection": (_select, (_W, _MASK, _SEED)),
    "S-STE": (_soft_threshold, (_STACK,)),
    "topology": (_topology, (_W, _MASK)),
    "schedules": (_schedules, (_STEP,)),
}
"""Name -> function and its arguments, on the host."""
