"""Dynamic attention: blocks chosen for every input and head inside the step, nothing to learn."""

import dataclasses
from typing import Literal, get_args

from sparsejax.checks import check_used, make_check
from sparsejax.masks import DynamicBlocks
from sparsejax.recipes.attention.sat import SatConfig, make_sat
from sparsejax.recipes.attention.spion import SpionConfig, make_spion
from sparsejax.recipes.recipe import Phase, Recipe
from sparsejax.shares import count_share

type DensePhase = Literal["fraction", "spion", "sat"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicAttentionConfig:
    """Settings of attention to blocks that are chosen from the input.

    Attributes:
      density: share of the visible blocks that is kept, exactly.
      num_queries: queries of each query block that are compared with all keys to choose its blocks.
        In a causal model these are its first one and those before; otherwise they lie evenly in it.
        0, of a causal model: whatever the input, what is nearest is kept.
      query_spacing: of a causal model, positions between the query blocks that are sampled, whole
        blocks; None = every one is.
      num_sinks: first key blocks that are always kept, beside the diagonal.
      share_heads: the heads of a layer share one budget; otherwise each has an equal one.
      dense_phase: what ends the dense phase: "fraction", a share of the run; or "spion" or "sat",
        the condition of that method, with its published settings.
      dense_fraction: share of the run with dense attention under "fraction"; 0 = none.
      latest_switch_fraction: of "spion" and "sat": switch after this share of the run at the
        latest; None = when the condition holds.
      block_size: side of a block, positions.
      causal: choose on and below the diagonal, for a query block from positions up to its first.
      num_layers: layers of the model.
      length: positions T.
      num_heads: query heads of a layer.
      head_dim: width of a head.
      num_steps: steps of the run.

    Raises:
      ValueError: if a setting is out of range.
    """

    density: float = 0.2
    num_queries: int = 1
    query_spacing: int | None = None
    num_sinks: int = 1
    share_heads: bool = True
    dense_phase: DensePhase = "fraction"
    dense_fraction: float = 0.0
    latest_switch_fraction: float | None = None
    block_size: int
    causal: bool = False
    num_layers: int
    length: int
    num_heads: int
    head_dim: int
    num_steps: int

    def __post_init__(self):
        check = make_check("recipe.dynamic_attention", self)
        phases = get_args(DensePhase.__value__)
        check(self.dense_phase in phases, "dense_phase", f"one of {phases}")
        check(0 <= self.dense_fraction < 1, "dense_fraction", "in [0, 1)")
        leaves = f"small enough to leave a sparse step of {self.num_steps}"
        check(self.dense_steps < self.num_steps, "dense_fraction", leaves)
        check_used(
            "recipe.dynamic_attention",
            self,
            {
                "dense_fraction": ("dense_phase", ("fraction",)),
                "latest_switch_fraction": ("dense_phase", ("spion", "sat")),
            },
        )
        try:
            self.make_chooser()
        except ValueError as error:
            raise ValueError(f"recipe.dynamic_attention.{error}") from error

    @property
    def dense_steps(self) -> int:
        """Steps of dense attention under "fraction"."""
        return count_share(self.dense_fraction, self.num_steps)

    def make_chooser(self) -> DynamicBlocks:
        """Return what chooses the blocks."""
        return DynamicBlocks(
            density=self.density,
            block_size=self.block_size,
            num_blocks=self.length // self.block_size,
            causal=self.causal,
            num_queries=self.num_queries,
            query_spacing=self.query_spacing,
            num_sinks=self.num_sinks,
            share_heads=self.share_heads,
        )


def make_dynamic_attention(config: DynamicAttentionConfig) -> Recipe:
    """Return the recipe with the phase "sparse", after a phase "dense" if there is one.

    Blocks are chosen anew in every forward pass; gradients go straight through those that are kept.
    The choice itself has none.
    """
    sparse = Phase("sparse", sparse_attention=True, choose_blocks=config.make_chooser())
    name = "dynamic-attention"
    if config.dense_phase == "fraction":
        dense = (Phase("dense", last_step=config.dense_steps),) if config.dense_steps else ()
        return Recipe(name, (*dense, sparse))
    shared = {
        "block_size": config.block_size,
        "causal": config.causal,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "length": config.length,
        "num_steps": config.num_steps,
        "latest_switch_fraction": config.latest_switch_fraction,
    }
    if config.dense_phase == "spion":
        base = make_spion(SpionConfig(variant="c", density=1.0, **shared))
    else:
        base = make_sat(SatConfig(density=1.0, head_dim=config.head_dim, **shared))
    dense, learned = base.phases

    def enter_phase(sparsity, phase, *, previous):
        del phase, previous
        # The maps were for the condition alone, and the masks stay full.
        return dataclasses.replace(sparsity, statistics={})

    plain = Recipe(name, ())
    return base._replace(
        name=name,
        phases=(
            dense,
            learned._replace(choose_blocks=sparse.choose_blocks, pruned_logits="masked"),
        ),
        enter_phase=enter_phase,
        phase_metrics=plain.phase_metrics,
        draw_phase=plain.draw_phase,
    )
