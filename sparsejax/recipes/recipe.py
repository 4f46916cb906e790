"""The protocol between a sparse-training method and the train step and loop.

A recipe is a NamedTuple of pure functions on pytrees, like an Optax transformation. Training runs
through its phases in order. A phase is static, so each one compiles its own step. Every function
has a default that does nothing (`hooks`), so a method states only what it does:

  inside every step        choose_masks, transform_params -> forward -> auxiliary_loss ->
                           mask_gradients -> clip -> transform_gradients -> skip_optimizer ->
                           optimizer -> transform_updates -> update -> metrics
  in a step that probes    observe, before transform_gradients; it may ask for the next phase
  between two phases       enter_phase

A recipe also owns its reports: what a step means for the ledger of FLOPs (account), the metrics in
progress lines (progress_metrics), and the pictures of a phase and of a run (draw_phase, draw_run).
"""

from typing import NamedTuple

from sparsejax.recipes import hooks
from sparsejax.recipes.phases import Observation as Observation
from sparsejax.recipes.phases import Phase as Phase
from sparsejax.recipes.phases import Sparsity as Sparsity
from sparsejax.recipes.phases import StepAccount as StepAccount


class Recipe(NamedTuple):
    """A sparse-training method as pure functions; the defaults train densely.

    Attributes:
      name: shown in progress lines, summaries and pictures.
      phases: in the order of training.
      progress_metrics: pairs (metric, label) for progress lines, which show the last value.
      parts: recipes that were chained (`chain`); () for a method by itself.

    All others are hooks; `sparsejax.recipes.hooks` says of each when it is called and with what.
    """

    name: str
    phases: tuple[Phase, ...]
    init: hooks.Init = hooks.keep_masks
    choose_masks: hooks.ChooseMasks = hooks.choose_kept_masks
    transform_params: hooks.TransformParams = hooks.keep_first
    auxiliary_loss: hooks.AuxiliaryLoss = hooks.add_no_loss
    mask_gradients: hooks.MaskGradients = hooks.keep_first
    transform_gradients: hooks.TransformGradients = hooks.keep_first
    skip_optimizer: hooks.SkipOptimizer = hooks.skip_nothing
    transform_updates: hooks.TransformUpdates = hooks.keep_first
    update: hooks.Update = hooks.update_nothing
    metrics: hooks.Metrics = hooks.measure_nothing
    observe: hooks.Observe = hooks.observe_nothing
    enter_phase: hooks.EnterPhase = hooks.enter_unchanged
    account: hooks.Account = hooks.account_for_nothing
    progress_metrics: tuple[tuple[str, str], ...] = ()
    draw_phase: hooks.DrawPhase = hooks.draw_no_phase
    draw_run: hooks.DrawRun = hooks.draw_no_run
    parts: tuple["Recipe", ...] = ()

    def find_next(self, phase: Phase, *, step: int, settled: bool) -> Phase | None:
        """Return the phase that follows after a step, None if the same goes on.

        Args:
          phase: of the step.
          step: steps done.
          settled: the step probed, and `observe` asked for the next phase.
        """
        if self.parts:
            parts = tuple(
                recipe.find_next(part, step=step, settled=settled) or part
                for recipe, part in zip(self.parts, phase.parts, strict=True)
            )
            if parts == phase.parts:
                return None
            return next(later for later in self.phases if later.parts == parts)
        expired = phase.last_step is not None and step >= phase.last_step
        asked = settled and phase.probe_every_steps is not None
        if phase == self.phases[-1] or not (expired or asked):
            return None
        return self.phases[self.phases.index(phase) + 1]
