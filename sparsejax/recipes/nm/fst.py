"""FST: train with 2:4 sparse feed-forward weights, then densely.

Masks keep two of four weights along both axes, so that y = x (W * M) and dx = dy (W * M)^T are
sparse products. dW is a dense product, or a sparse one where an unbiased estimator prunes its dy.
Every few steps masks are recomputed from the weights. Pruned weights go on training: the gradient
passes straight through to them, and a decay pulls them towards zero, so that masks settle.

Legend: L layers, K contracted axis, N columns of a weight.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from sparsejax.checks import make_check
from sparsejax.masks import (
    decay_in_backward,
    magnitude_nm_mask,
    masked_decay,
    transposable_mask,
)
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
from sparsejax.sharding import map_tiles
from sparsejax.shares import count_share

_FINISH = "dense finish"
_SEARCHED = NMPattern(2, 4, transposable=True)

type FSTVariant = Literal["fst", "ste", "sr_ste", "dense"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FSTConfig:
    """Settings of FST and of the methods it is compared with.

    Attributes:
      variant: "fst" decays gradients after they are clipped; "sr_ste" as `sr_ste_decay` says;
        "ste" has no decay; "dense" trains densely and computes masks only to log flip rates.
      sr_ste_decay: what "sr_ste" decays: "gradients", in the backward pass and so before clipping,
        as its released code; or "weights", at the learning rate, after the optimizer, which is
        ours. No effect with the other variants, so that a config may set it for who takes "sr_ste".
      decay_rate: lambda_W, decay of pruned weights per step; 0 for "ste" and "dense".
      decay_candidates: the rates that --mode=find_decay tries, separated by spaces; no effect in
        training.
      refresh_steps: steps between two mask searches.
      grad_pruning: how dy is pruned for dW, "none", "mvue" or "mvue_exact".
      dense_fraction: share of the steps that train densely at the end, in [0, 1).
      num_steps: steps of the run.
      patterns: layer name -> pattern of its weight.

    Raises:
      ValueError: if a setting is out of range or contradicts another.
    """

    variant: FSTVariant = "fst"
    sr_ste_decay: Literal["gradients", "weights"] = "weights"
    decay_rate: float = 6e-5
    decay_candidates: str = "1e-6 2e-6 6e-6 1e-5 2e-5 6e-5 1e-4 2e-4 6e-4 1e-3 2e-3 6e-3"
    refresh_steps: int = 40
    grad_pruning: Literal["none", "mvue", "mvue_exact"] = "none"
    dense_fraction: float = 1 / 6
    num_steps: int
    patterns: Mapping[str, NMPattern]

    def __post_init__(self):
        check = make_check("recipe.fst", self)
        variants = ("fst", "ste", "sr_ste", "dense")
        check(self.variant in variants, "variant", f"one of {variants}")
        decayed = ("gradients", "weights")
        check(self.sr_ste_decay in decayed, "sr_ste_decay", f"one of {decayed}")
        check(self.refresh_steps >= 1, "refresh_steps", "at least 1")
        prunings = ("none", "mvue", "mvue_exact")
        check(self.grad_pruning in prunings, "grad_pruning", f"one of {prunings}")
        check(0 <= self.dense_fraction < 1, "dense_fraction", "in [0, 1)")
        if self.variant in ("ste", "dense"):
            check(self.decay_rate == 0, "decay_rate", f"0 for variant {self.variant!r}")
        else:
            check(self.decay_rate >= 0, "decay_rate", "at least 0")
        check(
            self.variant != "dense" or self.grad_pruning == "none",
            "grad_pruning",
            "'none' for variant 'dense'",
        )
        check(bool(self.patterns), "patterns", "that of at least one weight")
        structured = all(isinstance(pattern, NMPattern) for pattern in self.patterns.values())
        check(structured, "patterns", "n:m for every weight")
        transposable = {pattern for pattern in self.patterns.values() if pattern.transposable}
        check(transposable <= {_SEARCHED}, "patterns", f"'{_SEARCHED}' where transposable")
        check(self.sparse_steps >= 1, "dense_fraction", "small enough to leave a sparse step")

    @property
    def sparse_steps(self) -> int:
        """Steps before the dense finish."""
        return self.num_steps - count_share(self.dense_fraction, self.num_steps)


def make_fst(config: FSTConfig) -> Recipe:
    """Return FST with the phases "sparse" and "dense finish", or one of its rivals.

    Statistics: "flip_rates", layer name -> f32[L], share of mask entries that changed at the last
    search; "flip_rate", f32[], over all weights; "decay_rate", f32[], an array so that one compiled
    step serves all rates.

    References:
      Hu et al., Accelerating Transformer Pre-training with 2:4 Sparsity, arXiv:2404.01847. SR-STE:
      Zhou et al., arXiv:2102.04010, whose released code adds its decay to the gradient that the
      backward pass computes.
    """

    def search(masks, params):
        def find(name, mask, w):
            del mask
            pattern = config.patterns[name]
            if pattern.transposable:
                return map_tiles(transposable_mask, name, w.shape)(w)
            return magnitude_nm_mask(w, n=pattern.n, m=pattern.m, axis=-2)

        return map_weight_masks(find, masks, params)

    def init(masks, params, key):
        del key
        found = search(masks, params)
        by_name = get_weight_masks(found)
        statistics = compare_weight_masks(by_name, by_name)
        statistics["decay_rate"] = jnp.float32(config.decay_rate)
        return Sparsity(
            masks=found, params={}, statistics=statistics, phase_start_step=jnp.int32(0)
        )

    def decays(variant, phase):
        return config.variant == variant and phase.sparse_weights

    def transform_params(params, sparsity, phase):
        if not decays("sr_ste", phase) or config.sr_ste_decay != "gradients":
            return params
        rate = sparsity.statistics["decay_rate"]
        return map_sparse_weights(
            lambda name, mask, w: decay_in_backward(w, mask, rate), sparsity.masks, params
        )

    def transform_gradients(grads, weights, sparsity, phase):
        if not decays("fst", phase):
            return grads

        def add_decay(name, mask, grad, w):
            del name
            return grad + masked_decay(w, mask, sparsity.statistics["decay_rate"])

        model = map_sparse_weights(add_decay, sparsity.masks, grads["model"], weights["model"])
        return grads | {"model": model}

    def is_due(step):
        return (step + 1) % config.refresh_steps == 0

    def update(sparsity, params, opt_state, grads, *, step, key, phase, learning_rate):
        del grads, key
        if decays("sr_ste", phase) and config.sr_ste_decay == "weights":
            pull = learning_rate * sparsity.statistics["decay_rate"]
            params = map_sparse_weights(
                lambda name, mask, w: w - masked_decay(w, mask, pull), sparsity.masks, params
            )
        if phase.name == _FINISH:
            return sparsity, params, opt_state

        def refresh(sparsity):
            masks = search(sparsity.masks, params)
            old, new = get_weight_masks(sparsity.masks), get_weight_masks(masks)
            statistics = sparsity.statistics | compare_weight_masks(old, new)
            return dataclasses.replace(sparsity, masks=masks, statistics=statistics)

        sparsity = jax.lax.cond(is_due(step), refresh, lambda sparsity: sparsity, sparsity)
        return sparsity, params, opt_state

    def metrics(sparsity, *, step, phase):
        if phase.name == _FINISH:
            return {}
        return flip_metrics(sparsity.statistics, due=is_due(step))

    first = Phase(
        "dense" if config.variant == "dense" else "sparse",
        sparse_weights=config.variant != "dense",
        grad_pruning=config.grad_pruning,
        last_step=config.sparse_steps if config.dense_fraction else None,
    )
    return Recipe(
        name=config.variant,
        phases=(first, Phase(_FINISH)) if config.dense_fraction else (first,),
        init=init,
        transform_params=transform_params,
        transform_gradients=transform_gradients,
        update=update,
        metrics=metrics,
        progress_metrics=FLIP_PROGRESS,
        draw_run=functools.partial(draw_flip_rates, config.variant),
    )
