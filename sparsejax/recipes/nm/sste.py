"""S-STE: 2:4 sparse weights that are a continuous function of dense ones, in every step.

The forward pass sees beta S(W). S keeps two of four weights along the contracted axis and shrinks
them by the third largest magnitude: values swap order only at zero, so S is continuous. The
gradient passes straight through, without beta. Masks are not transposable, so dx is a dense
product. There is no decay and no dense finish.

Legend: L layers, K contracted axis, N columns of a weight.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from sparsejax.checks import make_check
from sparsejax.masks import soft_threshold_mask, soft_threshold_scale, soft_threshold_ste
from sparsejax.patterns import NMPattern
from sparsejax.recipes.recipe import Phase, Recipe, Sparsity
from sparsejax.recipes.weight_masks import (
    FLIP_PROGRESS,
    compare_weight_masks,
    draw_flip_rates,
    flip_metrics,
    get_weight_masks,
    map_sparse_weights,
    map_weight_masks,
)

_AXIS = -2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SSTEConfig:
    """Settings of S-STE.

    Attributes:
      grad_pruning: how dy is pruned for dW, "none", "mvue" or "mvue_exact".
      flip_interval_steps: steps between the two masks that a flip rate compares; masks follow the
        weights in every step.
      patterns: layer name -> pattern of its weight: 2:4, not transposable.

    Raises:
      ValueError: if a setting is out of range.
    """

    grad_pruning: Literal["none", "mvue", "mvue_exact"] = "none"
    flip_interval_steps: int = 40
    patterns: Mapping[str, NMPattern]

    def __post_init__(self):
        check = make_check("recipe.sste", self)
        prunings = ("none", "mvue", "mvue_exact")
        check(self.grad_pruning in prunings, "grad_pruning", f"one of {prunings}")
        check(self.flip_interval_steps >= 1, "flip_interval_steps", "at least 1")
        check(
            bool(self.patterns) and set(self.patterns.values()) == {NMPattern(n=2, m=4)},
            "patterns",
            "2:4 and not transposable, for at least one weight",
        )


def make_sste(config: SSTEConfig) -> Recipe:
    """Return S-STE, which has the single phase "sparse".

    Statistics: "beta", layer name -> f32[L], computed once from the initial weights; "flip_rates"
    and "flip_rate" as in FST; "masks_before", which the next flip rate compares with.

    References:
      Hu, Zhu, Chen, S-STE: Continuous Pruning Function for Efficient 2:4 Sparse Pre-training,
      arXiv:2409.09099. Its FP8 products, simulated in the released code, are left out.
    """

    def find_masks(masks, params):
        return map_weight_masks(
            lambda name, mask, w: soft_threshold_mask(w, axis=_AXIS), masks, params
        )

    def init(masks, params, key):
        del key
        beta = {}

        def scale(name, mask, w):
            beta[name] = soft_threshold_scale(w, axis=_AXIS)
            return mask

        map_weight_masks(scale, masks, params)
        masks = find_masks(masks, params)
        by_name = get_weight_masks(masks)
        statistics = {
            "beta": beta,
            # A copy: donated buffers must not be shared.
            "masks_before": jax.tree.map(jnp.copy, by_name),
        } | compare_weight_masks(by_name, by_name)
        return Sparsity(
            masks=masks, params={}, statistics=statistics, phase_start_step=jnp.int32(0)
        )

    def transform_params(params, sparsity, phase):
        del phase
        beta = sparsity.statistics["beta"]
        return map_sparse_weights(
            lambda name, mask, w: soft_threshold_ste(w, beta[name], axis=_AXIS),
            sparsity.masks,
            params,
        )

    def is_due(step):
        return (step + 1) % config.flip_interval_steps == 0

    def update(sparsity, params, opt_state, grads, *, step, key, phase, learning_rate):
        del grads, key, phase, learning_rate
        masks = find_masks(sparsity.masks, params)
        old, new = sparsity.statistics["masks_before"], get_weight_masks(masks)

        def compare(statistics):
            return statistics | {"masks_before": new} | compare_weight_masks(old, new)

        statistics = jax.lax.cond(is_due(step), compare, lambda x: x, sparsity.statistics)
        sparsity = dataclasses.replace(sparsity, masks=masks, statistics=statistics)
        return sparsity, params, opt_state

    def metrics(sparsity, *, step, phase):
        del phase
        return flip_metrics(sparsity.statistics, due=is_due(step))

    phase = Phase("sparse", sparse_weights=True, grad_pruning=config.grad_pruning)
    return Recipe(
        name="sste",
        phases=(phase,),
        init=init,
        transform_params=transform_params,
        update=update,
        metrics=metrics,
        progress_metrics=FLIP_PROGRESS,
        draw_run=functools.partial(draw_flip_rates, "sste"),
    )
