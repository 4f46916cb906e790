"""SAT: train densely, learn each layer's attention pattern meanwhile, then train sparsely.

In the dense phase every layer n fits parameters W_n to its block-pooled attention map R_n by

  loss += 0.01 L sum_n mean((R_n - W_n W_n^T)^2)

R_n is constant: no gradient reaches the model through it. Let a_n be the attention map, averaged
over batch and heads of the step's training batch, and D_n its Frobenius distance to the map of the
probe before. The phase ends when in every layer the skewness of a_n is at least a threshold and
100 |D_n - D_n before| / D_n before is below another. The sparse phase keeps the largest blocks of
W_n W_n^T; pruned logits count as zero in the softmax.

With `per_head` every head m of the layer has a W_nm and blocks of its own, fitted to its own map;
the term of a layer is the mean over its heads, over which the released code averages too. a_n stays
the mean over heads, so that the switch comes as published.

Legend: L layers, N heads, T positions, I = J blocks along one side, P inner size of W.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.checks import make_check
from sparsejax.masks import (
    count_kept_blocks,
    map_distance,
    map_skewness,
    model_pooled_map,
    pool_attention,
    sat_pattern,
)
from sparsejax.patterns import HeadMaps
from sparsejax.recipes.attention.layer_masks import (
    check_attention_sizes,
    check_heads,
    draw_attention_patterns,
    give_heads_masks,
    set_attention_masks,
    split_maps,
)
from sparsejax.recipes.recipe import Observation, Phase, Recipe, Sparsity, keep_where
from sparsejax.shares import count_share

_LOSS_SCALE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class SatConfig:
    """Settings of SAT; the defaults are the published ones where there are any.

    Attributes:
      density: fraction of the visible blocks that a layer keeps, in (0, 1].
      min_skewness: gamma; the switch needs every layer's skewness to reach it.
      max_change_percent: d; the switch needs every layer's change below it.
      probe_every_steps: steps between two probes, 1 as published. More is ours: between probes W is
        fitted to the last map.
      map_decay: weight of the past in a running average of the map over probes, in [0, 1). Ours; 0
        as published.
      pattern_dim: P; None = the width of a head, as in the released code.
      pattern_init_scale: W is drawn uniformly from [0, this); 1 as published. Less is ours: at the
        published switch most kept blocks are those of the untrained W.
      pattern_rate_scale: multiplies the learning rate of W; 1 as published.
      per_head: fit and keep blocks of each head. Ours; False as published: all heads of a layer
        share its blocks.
      continue_schedule: keep optimizer state and schedule after the switch; momentum may then move
        W, which nothing reads any more. False as the released code: W is frozen, and a fresh
        optimizer trains at a constant half of the peak rate.
      pruned_logits: how pruned blocks count in the softmax, "zero" as published, or "masked".
      latest_switch_fraction: switch after this share of the run even if the condition does not
        hold. Ours; None as published.
      block_size: side of a block, positions.
      causal: fit and keep blocks on and below the diagonal only. Our extension: the published
        models are encoders.
      num_layers: layers of the model.
      num_heads: query heads of a layer.
      length: positions T.
      head_dim: width of a head.
      num_steps: steps of the run.

    Raises:
      ValueError: if a setting is out of range.
    """

    density: float = 0.05
    min_skewness: float = 1.7
    max_change_percent: float = 1.3
    probe_every_steps: int = 1
    map_decay: float = 0.0
    pattern_dim: int | None = None
    pattern_init_scale: float = 1.0
    pattern_rate_scale: float = 1.0
    per_head: bool = False
    continue_schedule: bool = False
    pruned_logits: Literal["masked", "zero"] = "zero"
    latest_switch_fraction: float | None = None
    block_size: int
    causal: bool = False
    num_layers: int
    num_heads: int
    length: int
    head_dim: int
    num_steps: int

    def __post_init__(self):
        check = make_check("recipe.sat", self)
        check_attention_sizes(check, self)
        check_heads(check, self)
        check(self.probe_every_steps > 0, "probe_every_steps", "positive")
        check(self.head_dim > 0, "head_dim", "positive")
        try:
            count_kept_blocks(self.num_blocks, density=self.density, causal=self.causal)
        except ValueError as error:
            raise ValueError(f"recipe.sat.{error}") from error
        check(self.max_change_percent > 0, "max_change_percent", "positive")
        check(0 <= self.map_decay < 1, "map_decay", "in [0, 1)")
        check(self.pattern_dim is None or self.pattern_dim > 0, "pattern_dim", "positive or None")
        check(self.pattern_init_scale > 0, "pattern_init_scale", "positive")
        check(self.pattern_rate_scale > 0, "pattern_rate_scale", "positive")
        check(self.pruned_logits in ("masked", "zero"), "pruned_logits", "'masked' or 'zero'")
        check(
            self.latest_switch_fraction is None or 0 < self.latest_switch_fraction < 1,
            "latest_switch_fraction",
            "in (0, 1) or None",
        )
        latest = self.latest_switch_step
        check(
            latest is None or latest < self.num_steps,
            "latest_switch_fraction",
            f"small enough to leave a sparse step of {self.num_steps}",
        )

    @property
    def latest_switch_step(self) -> int | None:
        """The last step of the dense phase, if there is one."""
        fraction = self.latest_switch_fraction
        return None if fraction is None else count_share(fraction, self.num_steps)

    @property
    def num_blocks(self) -> int:
        """Blocks along one side of an attention map."""
        return self.length // self.block_size


def make_sat(config: SatConfig) -> Recipe:
    """Return SAT with the phases "dense" and "sparse".

    Its own parameters are "pattern", f32[L, I, P], f32[L, N, I, P] with `per_head`, drawn uniformly
    from [0, 1). The metrics of a probe are f32[L]: "skewness", "distance" from the second probe on,
    "change_percent" from the third on. The sparse phase begins with one: "untrained_share", f32[L],
    how many of the kept blocks the W that it began with keeps as well.

    References:
      Yoon, Lee, Kim, Moon, Exploring Attention Sparsity to Accelerate Transformer Training on
      GPUs, IEEE Access 12 (2024), doi:10.1109/ACCESS.2024.3425638. Where paper and released code
      differ we follow the code. It also averages (R - W W^T)^2 over batch and heads; that adds a
      term without gradient, which we leave out.
    """
    L, T, I = config.num_layers, config.length, config.num_blocks  # noqa: E741
    visible_IJ = np.ones((I, I), bool)
    if config.causal:
        visible_IJ = np.tril(visible_IJ)

    heads = (config.num_heads,) if config.per_head else ()
    pool = functools.partial(pool_attention, block_size=config.block_size, filter_size=None)

    def choose_blocks(pattern):
        return sat_pattern(pattern, density=config.density, causal=config.causal)

    def init(masks, params, key):
        del params
        if config.per_head:
            masks = give_heads_masks(masks, config.num_heads)
        shape = (L, *heads, I, config.pattern_dim or config.head_dim)
        pattern = config.pattern_init_scale * jax.random.uniform(key, shape, jnp.float32)
        statistics = {
            "num_checks": jnp.int32(0),
            "map_before": jnp.zeros((L, T, T), jnp.float32),
            "distance": jnp.zeros((L,), jnp.float32),
            "pooled": jnp.zeros((L, *heads, I, I), jnp.float32),
            "untrained": choose_blocks(pattern),
        }
        return Sparsity(
            masks=masks,
            params={"pattern": pattern},
            statistics=statistics,
            phase_start_step=jnp.int32(0),
        )

    def auxiliary_loss(sparsity, attention_maps, phase):
        if phase.name != "dense":
            return jnp.float32(0)
        target, seen = sparsity.statistics["pooled"], sparsity.statistics["num_checks"] > 0
        if attention_maps is not None:
            (_, target), seen = split_maps(attention_maps, pool), True
        error = model_pooled_map(sparsity.params["pattern"]) - jax.lax.stop_gradient(target)
        mse = (error**2).mean((-2, -1), where=visible_IJ)
        return jnp.where(seen, _LOSS_SCALE * L * mse.reshape(L, -1).mean(1).sum(), 0.0)

    def observe(sparsity, attention_maps, phase):
        del phase
        old = sparsity.statistics
        check = old["num_checks"] + 1
        if config.map_decay:
            weight = jnp.where(check == 1, 0.0, config.map_decay)
            before = old["map_before"]
            if config.per_head:
                before = HeadMaps(before, old["pooled"])
            attention_maps = jax.tree.map(
                lambda old, new: weight * old + (1 - weight) * new, before, attention_maps
            )
        maps, pooled = split_maps(attention_maps, pool)
        skewness = map_skewness(maps)
        # The first check has nothing to compare with.
        distance = jnp.where(check == 1, 0.0, map_distance(old["map_before"], maps))
        # After a distance of 0 this is infinite or NaN, which is below no threshold.
        change_percent = 100 * jnp.abs(distance - old["distance"]) / old["distance"]
        ripe = (skewness >= config.min_skewness) & (change_percent < config.max_change_percent)
        statistics = {
            "num_checks": check,
            "map_before": maps,
            "distance": distance,
            "pooled": pooled,
            "untrained": old["untrained"],
        }
        observation = Observation(
            change_phase=ripe.all(),
            metrics={
                "skewness": skewness,
                "distance": keep_where(check > 1, distance),
                "change_percent": keep_where((check > 2) & (old["distance"] > 0), change_percent),
            },
        )
        return dataclasses.replace(sparsity, statistics=statistics), observation

    def enter_phase(sparsity, phase, *, previous):
        del phase, previous
        pattern = choose_blocks(sparsity.params["pattern"])
        shared = pattern & sparsity.statistics["untrained"]
        num_shared, num_kept = (x.reshape(L, -1).sum(1) for x in (shared, pattern))
        return dataclasses.replace(
            sparsity,
            masks=set_attention_masks(sparsity.masks, pattern),
            # Only the switch needs the maps. The pooled ones stay for the picture.
            statistics={
                "pooled": sparsity.statistics["pooled"],
                "untrained_share": (num_shared / num_kept).astype(jnp.float32),
            },
        )

    def transform_updates(updates, sparsity, phase):
        del sparsity, phase
        if config.pattern_rate_scale == 1:
            return updates
        scaled = jax.tree.map(lambda u: config.pattern_rate_scale * u, updates["recipe"])
        return updates | {"recipe": scaled}

    def phase_metrics(sparsity, phase):
        if phase.name == "dense":
            return {}
        return {"untrained_share": sparsity.statistics["untrained_share"]}

    dense = Phase(
        "dense",
        probe_every_steps=config.probe_every_steps,
        pool_map=pool if config.per_head else None,
        last_step=config.latest_switch_step,
        ends_when=(
            f"every layer's map has a skewness of at least {config.min_skewness:g} and a distance "
            f"to the map before that changes by less than {config.max_change_percent:g} %"
        ),
    )
    fresh = {"learning_rate": "constant", "learning_rate_scale": 0.5, "reset_optimizer": True}
    sparse = Phase(
        "sparse",
        sparse_attention=True,
        pruned_logits=config.pruned_logits,
        **({} if config.continue_schedule else fresh),
    )
    return Recipe(
        name="sat",
        phases=(dense, sparse),
        init=init,
        auxiliary_loss=auxiliary_loss,
        transform_updates=transform_updates,
        observe=observe,
        enter_phase=enter_phase,
        phase_metrics=phase_metrics,
        draw_phase=functools.partial(
            draw_attention_patterns,
            "sat",
            config.causal,
            note=(
                "SAT keeps the largest blocks of W Wᵀ, its symmetric fit to the maps of the dense\n"
                "phase, and not those where the last map alone, shown here, is largest."
            ),
        ),
    )
