"""What the hooks of a recipe take and return."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.patterns import BlockChooser, PoolMap
from sparsejax.types import PyTree


class Phase(NamedTuple):
    """A stretch of training with one compiled step.

    Attributes:
      name: unique in the recipe; recorded in checkpoints.
      sparse_attention: False attends everywhere.
      position_mask: (T) -> bool[T, T], True = kept: sparse attention keeps these positions instead
        of the blocks of the masks, which saves counted FLOPs and no time. None keeps the blocks.
      choose_blocks: sparse attention keeps the blocks that this chooses for each example and head,
        from queries and keys, instead of those of the masks. None keeps those of the masks.
      pruned_logits: how pruned attention blocks count in the softmax, "masked" or "zero".
      changes_attention: `update` or `choose_masks` change attention masks within the phase. Their
        lists of blocks are then built in every step and not once.
      sparse_weights: False ignores the masks of weights.
      grad_pruning: how gradients are pruned for the gradient of sparse weights, "none", "mvue" or
        "mvue_exact".
      masked_gradients: the step sets the gradient of pruned weights to 0, and counted FLOPs leave
        it out. False trains them straight through.
      gradient_density: share of every sparse weight that has a gradient, for counted FLOPs, where
        `mask_gradients` keeps neither all nor what the masks keep; None elsewhere.
      last_step: the phase ends after this many steps of the run at the latest; None = no limit.
      ends_when: what `observe` waits for; shown when the phase never ends.
      probe_every_steps: steps between two that probe, that is, pass the attention maps of their
        forward pass to `auxiliary_loss` and `observe`; None = never.
      pool_map: makes something small of each head's map, of which a probe then passes on as
        `HeadMaps`, beside the mean over heads. None passes on the mean alone.
      learning_rate: "schedule" continues it, "restart" starts it again at the phase's first step,
        "constant" holds the base rate.
      learning_rate_scale: multiplies the rate.
      reset_optimizer: the phase begins with fresh optimizer state.
      parts: of recipes that were chained, the phase that each of them is in.
    """

    name: str
    sparse_attention: bool = False
    position_mask: Callable[[int], jax.Array] | None = None
    choose_blocks: BlockChooser | None = None
    pruned_logits: Literal["masked", "zero"] = "masked"
    changes_attention: bool = False
    sparse_weights: bool = False
    grad_pruning: Literal["none", "mvue", "mvue_exact"] = "none"
    masked_gradients: bool = False
    gradient_density: float | None = None
    last_step: int | None = None
    ends_when: str = "the recipe's condition holds"
    probe_every_steps: int | None = None
    pool_map: PoolMap | None = None
    learning_rate: Literal["schedule", "restart", "constant"] = "schedule"
    learning_rate_scale: float = 1.0
    reset_optimizer: bool = False
    parts: tuple["Phase", ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Everything a recipe keeps in the train state.

    Attributes:
      masks: nested dict of bool arrays, True = kept, as the model's `SparsityMask` variables.
      params: the recipe's own trainable parameters, updated by the same optimizer.
      statistics: whatever the current phase needs to remember.
      phase_start_step: i32[], steps done when the current phase began; of chained recipes, when the
        part began that does not follow the schedule of the learning rate.
    """

    masks: PyTree
    params: PyTree
    statistics: PyTree
    phase_start_step: jax.Array


class Measured(NamedTuple):
    """A metric that has a value in some steps, or in some layers, only.

    Rows of metrics leave out what has no value, and write null for a layer that has none.

    Attributes:
      value: f32[], or f32[L] with an entry for each layer; 0 where it is not known.
      known: bool[], or bool[L] like the value.
    """

    value: jax.Array
    known: jax.Array


type Metric = jax.Array | Measured
"""What is logged under one name; an array is known everywhere."""


def keep_where(known: jax.Array, metric: Metric) -> Measured:
    """Return a metric that is known only where a condition holds too.

    A NaN would say "no value" as well, and stop a healthy run under `JAX_DEBUG_NANS`.

    Args:
      known: bool[], or bool[L].
      metric: f32[] or f32[L], whatever its values are where the condition does not hold.

    Example:
      >>> distance = jnp.array([0.0, 2.0])
      >>> keep_where(distance > 0, 1 / distance)
      Measured(value=Array([0. , 0.5], dtype=float32), known=Array([False,  True], dtype=bool))
    """
    value, before = metric if isinstance(metric, Measured) else (metric, True)
    known = known & jnp.asarray(before)
    return Measured(jnp.where(known, value, 0), known)


class Observation(NamedTuple):
    """What `observe` concluded.

    Attributes:
      change_phase: bool[], enter the next phase after this step.
      metrics: for the log, by name.
    """

    change_phase: jax.Array
    metrics: Mapping[str, Metric]


class StepAccount(NamedTuple):
    """What a step means for the ledger of FLOPs.

    Attributes:
      dense_gradient: the step computed the gradient of pruned weights too.
      weight_density: layer name -> f32[L], kept fraction of a weight after the step; empty if no
        mask changed.
    """

    dense_gradient: bool = False
    weight_density: Mapping[str, Sequence[float]] = {}
