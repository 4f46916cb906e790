"""The protocol between a sparse-training method and the train step and loop.

A recipe is a NamedTuple of pure functions on pytrees, like an Optax transformation. Training runs
through its phases in order. A phase is static, so each one compiles its own step. Every function
has a default that does nothing, so a method states only what it does:

  inside every step        choose_masks, transform_params -> forward -> auxiliary_loss ->
                           mask_gradients -> clip -> transform_gradients -> skip_optimizer ->
                           optimizer -> transform_updates -> update -> metrics
  in a step that probes    observe, before transform_gradients; it may ask for the next phase
  between two phases       enter_phase

A recipe also owns its reports: what a step means for the ledger of FLOPs (account), the metrics in
progress lines (progress_metrics), and the pictures of a phase and of a run (draw_phase, draw_run).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax.types import PyTree


class Phase(NamedTuple):
    """A stretch of training with one compiled step.

    Attributes:
      name: unique in the recipe; recorded in checkpoints.
      sparse_attention: False attends everywhere.
      position_mask: (T) -> bool[T, T], True = kept: sparse attention keeps these positions instead
        of the blocks of the masks, which saves counted FLOPs and no time. None keeps the blocks.
      pruned_logits: how pruned attention blocks count in the softmax, "masked" or "zero".
      changes_attention: `update` or `choose_masks` change attention masks within the phase. Their
        lists of blocks are then built in every step and not once.
      sparse_weights: False ignores the masks of weights.
      grad_pruning: how gradients are pruned for the gradient of sparse weights, "none", "mvue" or
        "mvue_exact".
      masked_gradients: pruned weights have no gradient, and counted FLOPs leave it out. False
        trains them straight through.
      last_step: the phase ends after this many steps of the run at the latest; None = no limit.
      ends_when: what `observe` waits for; shown when the phase never ends.
      probe_every_steps: steps between two that probe, that is, pass the attention maps of their
        forward pass to `auxiliary_loss` and `observe`; None = never.
      learning_rate: "schedule" continues it, "restart" starts it again at the phase's first step,
        "constant" holds the base rate.
      learning_rate_scale: multiplies the rate.
      reset_optimizer: the phase begins with fresh optimizer state.
    """

    name: str
    sparse_attention: bool = False
    position_mask: Callable[[int], jax.Array] | None = None
    pruned_logits: Literal["masked", "zero"] = "masked"
    changes_attention: bool = False
    sparse_weights: bool = False
    grad_pruning: Literal["none", "mvue", "mvue_exact"] = "none"
    masked_gradients: bool = False
    last_step: int | None = None
    ends_when: str = "the recipe's condition holds"
    probe_every_steps: int | None = None
    learning_rate: Literal["schedule", "restart", "constant"] = "schedule"
    learning_rate_scale: float = 1.0
    reset_optimizer: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Everything a recipe keeps in the train state.

    Attributes:
      masks: nested dict of bool arrays, True = kept, as the model's `SparsityMask` variables.
      params: the recipe's own trainable parameters, updated by the same optimizer.
      statistics: whatever the current phase needs to remember.
      phase_start_step: i32[], steps done when the current phase began.
    """

    masks: PyTree
    params: PyTree
    statistics: PyTree
    phase_start_step: jax.Array


class Observation(NamedTuple):
    """What `observe` concluded.

    Attributes:
      change_phase: bool[], enter the next phase after this step.
      metrics: arrays for the log, by name.
    """

    change_phase: jax.Array
    metrics: dict[str, jax.Array]


class StepAccount(NamedTuple):
    """What a step means for the ledger of FLOPs.

    Attributes:
      dense_gradient: the step computed the gradient of pruned weights too.
      weight_density: layer name -> f32[L], kept fraction of a weight after the step; empty if no
        mask changed.
    """

    dense_gradient: bool = False
    weight_density: Mapping[str, Sequence[float]] = {}


def _init(masks: PyTree, params: PyTree, key: jax.Array) -> Sparsity:
    del params, key
    return Sparsity(masks=masks, params={}, statistics={}, phase_start_step=jnp.int32(0))


def _choose_masks(sparsity: Sparsity, *, step: jax.Array, phase: Phase) -> PyTree:
    del step, phase
    return sparsity.masks


def _transform_params(params: PyTree, sparsity: Sparsity, phase: Phase) -> PyTree:
    del sparsity, phase
    return params


def _auxiliary_loss(sparsity: Sparsity, attention_maps: jax.Array | None, phase: Phase):
    del sparsity, attention_maps, phase
    return jnp.float32(0)


def _mask_gradients(grads: PyTree, sparsity: Sparsity, phase: Phase) -> PyTree:
    del sparsity, phase
    return grads


def _transform_gradients(grads: PyTree, params: PyTree, sparsity: Sparsity, phase: Phase):
    del params, sparsity, phase
    return grads


def _transform_updates(updates: PyTree, sparsity: Sparsity, phase: Phase) -> PyTree:
    del sparsity, phase
    return updates


def _skip_optimizer(step: jax.Array, phase: Phase) -> jax.Array:
    del step, phase
    return jnp.bool_(False)


def _update(sparsity, params, opt_state, grads, *, step, key, phase, learning_rate):
    del grads, step, key, phase, learning_rate
    return sparsity, params, opt_state


def _metrics(sparsity: Sparsity, *, step: jax.Array, phase: Phase) -> dict[str, jax.Array]:
    del sparsity, step, phase
    return {}


def _observe(sparsity: Sparsity, attention_maps: jax.Array, phase: Phase):
    del attention_maps, phase
    return sparsity, Observation(change_phase=jnp.bool_(False), metrics={})


def _enter_phase(sparsity: Sparsity, phase: Phase) -> Sparsity:
    del phase
    return sparsity


def _account(values: Mapping[str, Any]) -> StepAccount:
    del values
    return StepAccount()


def _draw_phase(sparsity: Sparsity, phase: Phase, *, step: int, folder: Path) -> None:
    del sparsity, phase, step, folder


def _draw_run(rows: Sequence[Mapping[str, Any]], *, folder: Path) -> None:
    del rows, folder


class Recipe(NamedTuple):
    """A sparse-training method as pure functions; the defaults train densely.

    Attributes:
      name: shown in progress lines, summaries and pictures.
      phases: in the order of training.
      init: (masks, params, key) -> Sparsity, before the first step; masks are all True.
      choose_masks: (sparsity, *, step, phase) -> masks that the forward pass of a training step
        sees, like `sparsity.masks`, which evaluation sees.
      transform_params: (params, sparsity, phase) -> params that the forward pass sees.
      auxiliary_loss: (sparsity, attention_maps, phase) -> f32[], added to the loss. Gradients
        flow to `sparsity.params` only. Maps are None in a step that does not probe.
      mask_gradients: (grads, sparsity, phase) -> grads, before they are measured and clipped.
      transform_gradients: (grads, params, sparsity, phase) -> grads, after clipping and before
        the optimizer.
      skip_optimizer: (step, phase) -> bool[], True leaves parameters and optimizer state alone.
      transform_updates: (updates, sparsity, phase) -> updates, what the optimizer adds to the
        parameters at a learning rate of 1, weight decay included.
      update: (sparsity, params, opt_state, grads, *, step, key, phase, learning_rate) ->
        (sparsity, params, opt_state), the method's own changes at the end of a step. Gradients are
        those of the batch, before `mask_gradients` and clipping. Moments in `opt_state` are dicts
        like `grads`, with the keys "model" and "recipe".
      metrics: (sparsity, *, step, phase) -> dict of f32 arrays, logged after every step; arrays
        that are all NaN are left out. `step` is that of `update`.
      observe: (sparsity, attention_maps, phase) -> (sparsity, Observation). Maps are
        f32[L, T, T], averaged over batch and heads of the step's training batch.
      enter_phase: (sparsity, phase) -> sparsity, on entering any phase but the first; may
        change its structure.
      account: (values) -> StepAccount; values are the metrics of a step as numbers and lists. A
        recipe whose masks change their density reports it here.
      progress_metrics: pairs (metric, label) for progress lines, which show the last value.
      draw_phase: (sparsity, phase, *, step, folder) -> None, write pictures when a phase begins.
      draw_run: (rows, *, folder) -> None, write pictures of a finished run; rows are the lines of
        `metrics.jsonl`.
    """

    name: str
    phases: tuple[Phase, ...]
    init: Callable = _init
    choose_masks: Callable = _choose_masks
    transform_params: Callable = _transform_params
    auxiliary_loss: Callable = _auxiliary_loss
    mask_gradients: Callable = _mask_gradients
    transform_gradients: Callable = _transform_gradients
    skip_optimizer: Callable = _skip_optimizer
    transform_updates: Callable = _transform_updates
    update: Callable = _update
    metrics: Callable = _metrics
    observe: Callable = _observe
    enter_phase: Callable = _enter_phase
    account: Callable[[Mapping[str, Any]], StepAccount] = _account
    progress_metrics: tuple[tuple[str, str], ...] = ()
    draw_phase: Callable = _draw_phase
    draw_run: Callable = _draw_run
