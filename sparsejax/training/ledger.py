"""The FLOPs of every step of a phase, followed while masks change."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsejax.models import TransformerConfig
from sparsejax.recipes import Phase
from sparsejax.training.density import Density, count_step_flops

_CHANGED = "mask_density/"


class FlopsLedger:
    """Densities and FLOPs of a phase's steps, in order.

    They change where a recipe's metrics say that masks do; how is in `training/density.py` and
    `training/flops.py`: the head counts, and of causal attention the visible half.

    Attributes:
      density: Density of the next step.
      step_flops: float, forward and backward pass of the next step over all examples.
      dense_step_flops: float, those of a dense step.
    """

    def __init__(
        self, model: TransformerConfig, phase: Phase, density: Density, *, batch_size: int
    ):
        """Open the book of a phase.

        Args:
          model: TransformerConfig.
          phase: Phase.
          density: Density of its first step, or of the first after a resumption.
          batch_size: int, examples of a step.
        """
        self._model, self._phase, self._batch_size = model, phase, batch_size
        self.density = density
        self.step_flops, self.dense_step_flops = self._count()

    def describe_step(self) -> dict[str, float]:
        """Return what a row of metrics tells of the next step.

        Returns:
          dict with "density", mean over layers of attention's, "weight_density" if weights are
          sparse, and "step_flops".
        """
        row = {"density": float(self.density.attention.mean())}
        if (mean := self.density.mean_weights) is not None:
            row["weight_density"] = mean
        return row | {"step_flops": self.step_flops}

    def book(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Enter one step.

        Args:
          values: metrics of the step. "dense_gradient" and "mask_density/NAME" are read, as
            `Recipe.metrics` describes them; masks change at the end of a step.

        Returns:
          dict, as `describe_step` of this step.
        """
        row = self.describe_step()
        if values.get("dense_gradient"):
            row["step_flops"] = self._count(dense_gradient=True)[0]
        changed = {
            name.removeprefix(_CHANGED): np.asarray(density, np.float32)
            for name, density in values.items()
            if name.startswith(_CHANGED)
        }
        if changed and self._phase.sparse_weights:
            self.density = self.density._replace(weights=self.density.weights | changed)
            self.step_flops, _ = self._count()
        return row

    def _count(self, **options: bool) -> tuple[float, float]:
        return count_step_flops(self._model, self._phase, self.density, self._batch_size, **options)
