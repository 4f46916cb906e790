"""SPION: train densely, choose each layer's attention blocks once, then train sparsely.

In the dense phase every probing step measures A_n, the attention map of layer n, averaged over
batch and heads of that step's training batch. With D_c = ||before - A_n||_F at check c, the phase
ends when floor(100 |D_c - D_{c-1}| / D_{c-1}) is below a threshold in every layer; a layer whose
D_{c-1} is 0 counts as still changing. The patterns are made from the last maps (`flood_fill`) and
stay fixed. From then on pruned logits count as zero in the softmax.

Legend: L layers, N heads, T positions, I = J blocks along one side.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from sparsejax.checks import check_used, make_check
from sparsejax.masks import (
    choose_walk,
    flood_fill,
    flood_reach,
    map_distance,
    pool_attention,
    top_k_blocks,
)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpionConfig:
    """Settings of SPION; the defaults are the published ones where there is one for all tasks.

    Attributes:
      variant: "cf" convolution and flood fill, "c" convolution and top-k, "f" flood fill only.
      quantile: threshold of the flood fill over the pooled map, in (0, 1), of "cf" and "f".
        Published: 0.96 to 0.99, depending on the task.
      density: share of the visible blocks that "c" keeps, at least that of the diagonal. For "cf"
        and "f" it takes the place of the quantile, which is then chosen to keep exactly as many
        blocks (ours).
      walk: of the flood fill, "greedy" as published, to the largest neighbour, or "flood", to every
        neighbour above the threshold (ours). None is "greedy", or "flood" in a causal model, where
        greedy walks reach some 4 / I of the blocks.
      filter_size: length of the diagonal filter, positions, odd.
      block_size: side of a block, positions.
      probe_interval_fraction: share of the run from one check to the next.
      max_change_percent: the switch needs every layer's change below this.
      keep_map_at_second_check: the second check does not replace the remembered map, as in the
        released code, so that the third spans two intervals. False replaces it every time.
      restart_learning_rate: start the schedule again, from its warm-up, after the switch. None as
        the released code: "cf" and "c" restart, "f" does not.
      per_head: choose the blocks of each head from its own map, by the rule of the variant; "c"
        then keeps exactly the density. The switch still looks at the mean over heads. Ours; False
        as published: all heads of a layer share its blocks.
      pruned_logits: how pruned blocks count in the softmax, "zero" as published, or "masked".
      latest_switch_fraction: switch after this share of the run, at the next check, even if the
        maps still change. Ours; None as published.
      causal: keep blocks on and below the diagonal only. Our extension: the published models are
        encoders.
      num_layers: layers of the model.
      num_heads: query heads of a layer.
      length: positions T.
      num_steps: steps of the run.

    Raises:
      ValueError: if a setting is out of range or belongs to another variant.
    """

    variant: Literal["cf", "c", "f"] = "cf"
    quantile: float | None = None
    density: float | None = None
    walk: Literal["greedy", "flood"] | None = None
    filter_size: int = 31
    block_size: int
    probe_interval_fraction: float = 0.1
    max_change_percent: int = 15
    keep_map_at_second_check: bool = True
    restart_learning_rate: bool | None = None
    per_head: bool = False
    pruned_logits: Literal["masked", "zero"] = "zero"
    latest_switch_fraction: float | None = None
    causal: bool = False
    num_layers: int
    num_heads: int
    length: int
    num_steps: int

    def __post_init__(self):
        check = make_check("recipe.spion", self)
        check(self.variant in ("cf", "c", "f"), "variant", "'cf', 'c' or 'f'")
        check_attention_sizes(check, self)
        check_heads(check, self)
        check(0 < self.probe_interval_fraction < 1, "probe_interval_fraction", "in (0, 1)")
        if self.variant == "c" or self.density is not None:
            num_blocks = self.length // self.block_size
            diagonal = 2 / (num_blocks + 1) if self.causal else 1 / num_blocks
            in_range = self.density is not None and diagonal <= self.density <= 1
            keeps = f"for variant {self.variant!r}, which keeps the diagonal"
            check(in_range, "density", f"in [{diagonal:.4g}, 1] {keeps}")
            given = f"None for variant {self.variant!r} with density={self.density}"
            check(self.quantile is None, "quantile", given)
        else:
            in_range = self.quantile is not None and 0 < self.quantile < 1
            check(in_range, "quantile", f"in (0, 1) for variant {self.variant!r} without density")
        check(self.walk in ("greedy", "flood", None), "walk", "'greedy', 'flood' or None")
        users = {"filter_size": ("variant", ("cf", "c")), "walk": ("variant", ("cf", "f"))}
        check_used("recipe.spion", self, users)
        check(self.filter_size % 2 == 1 and self.filter_size > 0, "filter_size", "odd and positive")
        check(self.max_change_percent > 0, "max_change_percent", "positive")
        check(self.pruned_logits in ("masked", "zero"), "pruned_logits", "'masked' or 'zero'")
        check(
            self.latest_switch_fraction is None or 0 < self.latest_switch_fraction < 1,
            "latest_switch_fraction",
            "in (0, 1) or None",
        )
        latest, interval = self.latest_switch_step, self.probe_every_steps
        last_check = (self.num_steps - 1) // interval * interval
        check(
            latest is None or latest <= last_check,
            "latest_switch_fraction",
            f"at or before the last check, after step {last_check} of {self.num_steps} with "
            f"probe_interval_fraction={self.probe_interval_fraction}",
        )

    @property
    def wanted_density(self) -> float:
        """Share of the visible blocks that quantile or density asks for."""
        if self.density is not None:
            return self.density
        assert self.quantile is not None
        return 1 - self.quantile

    @property
    def probe_every_steps(self) -> int:
        """Steps from one check to the next."""
        return count_share(self.probe_interval_fraction, self.num_steps)

    @property
    def latest_switch_step(self) -> int | None:
        """The step of the last check before the switch, if it has to come."""
        if self.latest_switch_fraction is None:
            return None
        latest = count_share(self.latest_switch_fraction, self.num_steps)
        return math.ceil(latest / self.probe_every_steps) * self.probe_every_steps


def make_spion(config: SpionConfig) -> Recipe:
    """Return SPION with the phases "dense" and "sparse".

    Where walks are greedy the sparse phase begins with two metrics: "reach", f32[L], the share of
    the visible blocks that they visit, in the head where it is least if each has its own, and
    "wanted_density", f32[], the share that quantile or density asks for. A warning says where the
    first is less.

    References:
      Yoon, Han and Moon, SPION: Layer-Wise Sparse Training of Transformer via Convolutional
      Flood Filling, arXiv:2309.12578. Where paper and released code differ we follow the code.
    """
    num_blocks = config.length // config.block_size
    L, T, I = config.num_layers, config.length, num_blocks  # noqa: E741
    walk = choose_walk(config.walk, causal=config.causal)
    heads = (config.num_heads,) if config.per_head else ()
    pool = functools.partial(
        pool_attention,
        block_size=config.block_size,
        filter_size=None if config.variant == "f" else config.filter_size,
        causal=config.causal,
    )

    def init(masks, params, key):
        del params, key
        if config.per_head:
            masks = give_heads_masks(masks, config.num_heads)
        statistics = {
            "num_checks": jnp.int32(0),
            "map_before": jnp.zeros((L, T, T), jnp.float32),
            "distance": jnp.zeros((L,), jnp.float32),
            "pooled": jnp.zeros((L, *heads, I, I), jnp.float32),
        }
        return Sparsity(
            masks=masks, params={}, statistics=statistics, phase_start_step=jnp.int32(0)
        )

    def observe(sparsity, attention_maps, phase):
        del phase
        maps_LTT, pooled = split_maps(attention_maps, pool)
        old = sparsity.statistics
        check = old["num_checks"] + 1
        distance = map_distance(old["map_before"], maps_LTT)
        # After a distance of 0 this is infinite or NaN, which is below no threshold.
        change_percent = 100 * jnp.abs(distance - old["distance"]) / old["distance"]
        settled = jnp.floor(change_percent) < config.max_change_percent
        keep_before = (check == 2) & config.keep_map_at_second_check
        statistics = {
            "num_checks": check,
            "map_before": jnp.where(keep_before, old["map_before"], maps_LTT),
            # The first check has nothing to compare with.
            "distance": jnp.where(check == 1, 0.0, distance),
            "pooled": pooled,
        }
        observation = Observation(
            change_phase=(check >= 3) & settled.all(),
            metrics={
                "check": check,
                "distance": keep_where(check > 1, distance),
                "change_percent": keep_where((check > 2) & (old["distance"] > 0), change_percent),
            },
        )
        return dataclasses.replace(sparsity, statistics=statistics), observation

    def enter_phase(sparsity, phase, *, previous):
        del phase, previous
        pooled = sparsity.statistics["pooled"]
        if config.variant == "c":
            # As many blocks for each head: the published rule gives fewer to those that look near.
            pattern = top_k_blocks(
                pooled, density=config.density, causal=config.causal, exact=config.per_head
            )
        else:
            pattern = flood_fill(
                pooled,
                quantile=config.quantile,
                density=config.density,
                causal=config.causal,
                walk=walk,
            )
        return dataclasses.replace(
            sparsity,
            masks=set_attention_masks(sparsity.masks, pattern),
            # Only the switch needs the maps. The pooled ones stay for the picture.
            statistics={"pooled": pooled},
        )

    @jax.jit
    def measure_reach(pooled):
        reach = flood_reach(pooled, causal=config.causal, walk=walk).reshape(L, -1).min(1)
        return {"reach": reach, "wanted_density": jnp.float32(config.wanted_density)}

    def phase_metrics(sparsity, phase):
        if phase.name == "dense" or config.variant == "c" or walk == "flood":
            return {}
        return measure_reach(sparsity.statistics["pooled"])

    restart = config.restart_learning_rate
    if restart is None:
        restart = config.variant != "f"
    dense = Phase(
        "dense",
        probe_every_steps=config.probe_every_steps,
        pool_map=pool if config.per_head else None,
        last_step=config.latest_switch_step,
        ends_when=(
            "the distance between two attention maps of every layer changes by less than "
            f"{config.max_change_percent} % from one probe to the next"
        ),
    )
    sparse = Phase(
        "sparse",
        sparse_attention=True,
        pruned_logits=config.pruned_logits,
        learning_rate="restart" if restart else "schedule",
    )
    name = f"spion-{config.variant}"
    return Recipe(
        name=name,
        phases=(dense, sparse),
        init=init,
        observe=observe,
        enter_phase=enter_phase,
        phase_metrics=phase_metrics,
        phase_warnings=functools.partial(_warn_of_reach, config),
        draw_phase=functools.partial(draw_attention_patterns, name, config.causal),
    )


def _warn_of_reach(config: SpionConfig, values: Mapping[str, Any]) -> Sequence[str]:
    wanted = config.wanted_density
    num_blocks = config.length // config.block_size
    visible = num_blocks * (num_blocks + 1) // 2 if config.causal else num_blocks**2
    least = wanted - 0.5 / visible  # half a block less is the same count
    short = [layer for layer, reach in enumerate(values.get("reach", ())) if reach < least]
    if not short:
        return ()
    name = "quantile" if config.density is None else "density"
    return (
        f"greedy walks reach {min(values['reach']):.3f} of the visible blocks, and "
        f"recipe.spion.{name}={getattr(config, name)} asks for {wanted:.3g} of them; layers "
        f"{short} keep less. recipe.spion.walk='flood' reaches all.",
    )
