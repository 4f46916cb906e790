"""The hooks of a recipe: when each one is called, and with what.

A hook that one method alone uses says which, and why no other hook could serve it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

from sparsejax.patterns import HeadMaps
from sparsejax.recipes.phases import Metric, Observation, Phase, Sparsity, StepAccount
from sparsejax.types import PyTree


class Init(Protocol):
    """Before the first step; masks are all True."""

    def __call__(self, masks: PyTree, params: PyTree, key: jax.Array, /) -> Sparsity:
        """Return what the recipe keeps."""
        ...


class ChooseMasks(Protocol):
    """Masks that the forward pass of a training step sees, like `sparsity.masks`.

    Dynamic sparse training: the gradient of pruned blocks is wanted in few steps, and evaluation,
    which sees `sparsity.masks`, must not change with them.
    """

    def __call__(self, sparsity: Sparsity, /, *, step: jax.Array, phase: Phase) -> PyTree:
        """Return the masks."""
        ...


class TransformParams(Protocol):
    """Params that the forward pass sees, with their own gradient rule.

    S-STE: the threshold moves with the weights in every forward pass, evaluation too.
    """

    def __call__(self, params: PyTree, sparsity: Sparsity, phase: Phase, /) -> PyTree:
        """Return the params."""
        ...


class AuxiliaryLoss(Protocol):
    """f32[], added to the loss; gradients flow to `sparsity.params` only.

    SAT: its own parameters learn the pattern from the maps of the forward pass, which are None in a
    step that does not probe.
    """

    def __call__(
        self, sparsity: Sparsity, attention_maps: jax.Array | HeadMaps | None, phase: Phase, /
    ) -> jax.Array:
        """Return the loss."""
        ...


class MaskGradients(Protocol):
    """Gradients before they are measured and clipped.

    Methods that train other weights than the forward pass sees, such as Top-KAST
    (`examples/own_recipe.py`); `Phase.masked_gradients` does it for those that it does see.
    """

    def __call__(self, grads: PyTree, sparsity: Sparsity, phase: Phase, /) -> PyTree:
        """Return the gradients."""
        ...


class TransformGradients(Protocol):
    """Gradients after clipping and before the optimizer.

    FST: its decay goes through the optimizer's moments and is not clipped.
    """

    def __call__(
        self, grads: PyTree, params: PyTree, sparsity: Sparsity, phase: Phase, /
    ) -> PyTree:
        """Return the gradients."""
        ...


class SkipOptimizer(Protocol):
    """bool[], True leaves parameters and optimizer state alone.

    MST and RigL: an update of the masks takes the place of the optimizer's step, moments included.
    """

    def __call__(self, step: jax.Array, phase: Phase, /) -> jax.Array:
        """Return whether it is skipped."""
        ...


class TransformUpdates(Protocol):
    """What the optimizer adds to the parameters at a learning rate of 1, weight decay included.

    MST: the rate of a weight depends on the density of its layer.
    """

    def __call__(self, updates: PyTree, sparsity: Sparsity, phase: Phase, /) -> PyTree:
        """Return the updates."""
        ...


class Update(Protocol):
    """The method's own changes at the end of a step.

    Gradients are those of the batch, before `mask_gradients` and clipping. Moments in `opt_state`
    are dicts like `grads`, with the keys "model" and "recipe".
    """

    def __call__(
        self,
        sparsity: Sparsity,
        params: PyTree,
        opt_state: PyTree,
        grads: PyTree,
        /,
        *,
        step: jax.Array,
        key: jax.Array,
        phase: Phase,
        learning_rate: jax.Array,
    ) -> tuple[Sparsity, PyTree, PyTree]:
        """Return what the recipe keeps, parameters and optimizer state."""
        ...


class Metrics(Protocol):
    """Arrays by name, f32[] or f32[L], logged after every step.

    A metric that has no value in some steps, or for some layers, is a `Measured`; `keep_where`
    makes it.
    """

    def __call__(
        self, sparsity: Sparsity, /, *, step: jax.Array, phase: Phase
    ) -> Mapping[str, Metric]:
        """Return the metrics; `step` is that of `update`."""
        ...


class Observe(Protocol):
    """What the recipe makes of attention maps, f32[L, T, T].

    They are those of the step's training batch, averaged over batch and heads. In a phase that
    pools the map of each head they are HeadMaps with a leading axis L.
    """

    def __call__(
        self, sparsity: Sparsity, attention_maps: jax.Array | HeadMaps, phase: Phase, /
    ) -> tuple[Sparsity, Observation]:
        """Return what the recipe keeps, and what it concluded."""
        ...


class EnterPhase(Protocol):
    """Between two phases; may change the structure of what the recipe keeps."""

    def __call__(self, sparsity: Sparsity, phase: Phase, /, *, previous: Phase) -> Sparsity:
        """Return what the recipe keeps in the phase that begins."""
        ...


class PhaseMetrics(Protocol):
    """f32 arrays by name, logged when a phase begins, and in the summary of the run.

    SAT: what its switch has chosen does not change any more.
    """

    def __call__(self, sparsity: Sparsity, phase: Phase, /) -> Mapping[str, Metric]:
        """Return the metrics."""
        ...


class PhaseWarnings(Protocol):
    """What a person should know of a phase as it begins, from its `PhaseMetrics` as numbers.

    SPION: greedy walks may reach fewer blocks than its settings ask for.
    """

    def __call__(self, values: Mapping[str, Any], /) -> Sequence[str]:
        """Return a line for each."""
        ...


class Account(Protocol):
    """What a step means for the ledger of FLOPs, from its metrics as numbers and lists.

    Dynamic sparse training: masks change their density within a phase.
    """

    def __call__(self, values: Mapping[str, Any], /) -> StepAccount:
        """Return the account."""
        ...


class DrawPhase(Protocol):
    """Pictures when a phase begins."""

    def __call__(self, sparsity: Sparsity, phase: Phase, /, *, step: int, folder: Path) -> None:
        """Write them."""
        ...


class DrawRun(Protocol):
    """Pictures of a finished run, from the lines of `metrics.jsonl`."""

    def __call__(self, rows: Sequence[Mapping[str, Any]], /, *, folder: Path) -> None:
        """Write them."""
        ...
