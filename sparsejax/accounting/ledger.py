"""The FLOPs of a run, entered step by step while masks change.

A ledger is part of the state of a run: checkpoints hold what was spent, as float64 on the host,
where a sum over a million steps stays exact to 10 digits.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sparsejax.accounting.density import Density, PhaseFlops, make_dense, split_phase_flops
from sparsejax.accounting.units import choose_prefix
from sparsejax.models import TransformerConfig
from sparsejax.recipes import Phase, StepAccount

_PASSES = PhaseFlops._fields
_DENSE = "dense_equivalent"

type FlopsByPhase = dict[str, dict[str, Any]]
"""Phase -> "steps", int, and "forward", "backward", "update" and "dense_equivalent", part -> FLOPs.

"dense_equivalent" is what as many steps of dense training take. See `PhaseFlops` for the others."""


class FlopsLedger:
    """Densities and FLOPs of a run's steps, in order.

    They change where a phase begins, and where a recipe says that masks do. What is counted stands
    in `accounting/density.py` and `accounting/flops.py`: the head counts, and of causal attention
    the visible half.

    Attributes:
      totals: FlopsByPhase of the steps recorded so far.
      density: Density of the next step.
    """

    def __init__(
        self, model: TransformerConfig, *, batch_size: int, totals: FlopsByPhase | None = None
    ):
        """Begin an empty ledger, or go on with one.

        Args:
          model: what is trained.
          batch_size: examples of a step.
          totals: of the steps before a resumption; None at the beginning.
        """
        self._model, self._batch_size = model, batch_size
        self.totals: FlopsByPhase = {} if totals is None else totals
        self._phase: Phase
        self.density: Density
        self._flops: PhaseFlops
        self._dense: dict[str, float]

    def begin_phase(self, phase: Phase, density: Density) -> None:
        """Start accounting for a phase, or resume it.

        Args:
          phase: the phase.
          density: that of its next step.
        """
        self._phase, self.density = phase, density
        self._flops = self._count(density)
        dense = self._count(make_dense(density))
        self._dense = {part: sum(x[part] for x in dense) for part in dense.forward}

    @property
    def step_flops(self) -> float:
        """FLOPs of the next step, forward and backward pass over all examples."""
        return self._flops.total

    @property
    def dense_step_flops(self) -> float:
        """FLOPs of a dense step."""
        return sum(self._dense.values())

    def describe_step(self) -> dict[str, float]:
        """Return what a row of metrics tells of the next step.

        Returns:
          "attention_density", mean over layers, "weight_density" if weights are sparse, and
          "step_flops".
        """
        row = {"attention_density": float(self.density.attention.mean())}
        if (mean := self.density.mean_weights) is not None:
            row["weight_density"] = mean
        return row | {"step_flops": self.step_flops}

    def record_step(self, account: StepAccount) -> dict[str, float]:
        """Add one step.

        Args:
          account: what the recipe says of it; masks change at the end of a step.

        Returns:
          As `describe_step` of this step.
        """
        row, flops = self.describe_step(), self._flops
        if account.dense_gradient:
            flops = self._count(self.density, dense_gradient=True)
            row["step_flops"] = flops.total
        entry = self.totals.setdefault(self._phase.name, {"steps": 0})
        entry["steps"] += 1
        _add(entry, flops._asdict() | {_DENSE: self._dense})
        if account.weight_density and self._phase.sparse_weights:
            changed = {
                name: np.asarray(density, np.float32)
                for name, density in account.weight_density.items()
            }
            self.density = self.density._replace(weights=self.density.weights | changed)
            self._flops = self._count(self.density)
        return row

    def _count(self, density: Density, **options: bool) -> PhaseFlops:
        flops = split_phase_flops(self._model, self._phase, density, **options)
        return PhaseFlops(
            *({part: x * self._batch_size for part, x in parts.items()} for parts in flops)
        )


def check_totals(totals: FlopsByPhase) -> None:
    """Refuse a ledger whose columns have other names.

    Args:
      totals: of a checkpoint.

    Raises:
      ValueError: if it is one of an earlier version.
    """
    names = {"steps", *_PASSES, _DENSE}
    for phase, entry in totals.items():
        if entry.keys() != names:
            raise ValueError(
                f"the FLOPs of phase {phase!r} must be by {sorted(names)}, got {sorted(entry)}, as "
                "an earlier version counted them"
            )


def summarise_flops(totals: FlopsByPhase) -> dict[str, float]:
    """Condense a ledger into a flat dict.

    Args:
      totals: of the run.

    Returns:
      dict of the FLOPs of the whole run, "training_flops", and as a fraction of those of dense
      training, "training_flops_of_dense"; likewise of each phase that ran, with its name before,
      and "step_flops", the mean over its steps. Empty for an empty ledger.
    """
    summary: dict[str, float] = {}
    for phase, entry in totals.items():
        flops = _sum_passes(entry)
        summary[f"{phase}_step_flops"] = flops / entry["steps"]
        summary[f"{phase}_training_flops"] = flops
        summary[f"{phase}_training_flops_of_dense"] = flops / sum(entry[_DENSE].values())
    if totals:
        total = sum(map(_sum_passes, totals.values()))
        dense = sum(sum(entry[_DENSE].values()) for entry in totals.values())
        summary |= {"training_flops": total, "training_flops_of_dense": total / dense}
    return summary


def format_flops(totals: FlopsByPhase) -> list[str]:
    """Write a ledger for a person: passes by phase, and all of the run by part of the model.

    Args:
      totals: of the run.

    Returns:
      list of str, lines; empty for an empty ledger.

    Example:
      >>> entry = {"forward": {"layer 0": 1e12, "head": 2e12}, "update": {"layer 0": 0, "head": 0}}
      >>> entry |= {"backward": {"layer 0": 2e12, "head": 4e12}, "steps": 5}
      >>> entry |= {"dense_equivalent": {"layer 0": 6e12, "head": 6e12}}
      >>> print("\\n".join(format_flops({"sparse": entry})))
      TFLOPs                 forward    backward      update   of dense
        sparse                 3.000       6.000       0.000      75.0%
        whole run              3.000       6.000       0.000      75.0%
        by part            layer 0 50.0%, head 100.0% of dense
    """
    if not totals:
        return []
    whole: dict[str, Any] = {}
    for entry in totals.values():
        _add(whole, entry)
    scale, prefix = choose_prefix(_sum_passes(whole))
    unit = f"{prefix}FLOPs"
    lines = [f"{unit:<18}" + "".join(f"{name:>12}" for name in _PASSES) + "   of dense"]
    for name, entry in {**totals, "whole run": whole}.items():
        share = _sum_passes(entry) / sum(entry[_DENSE].values())
        passes = "".join(f"{sum(entry[n].values()) / scale:>12,.3f}" for n in _PASSES)
        lines.append(f"  {name:<16}{passes}{share:>11.1%}")
    parts = [
        f"{part} {sum(whole[n][part] for n in _PASSES) / dense:.1%}"
        for part, dense in whole[_DENSE].items()
    ]
    return [*lines, f"  {'by part':<18} {', '.join(parts)} of dense"]


def _sum_passes(entry: Mapping[str, Any]) -> float:
    return sum(sum(entry[name].values()) for name in _PASSES)


def _add(entry: dict[str, Any], more: Mapping[str, Any]) -> None:
    for name in (*_PASSES, _DENSE):
        before = entry.get(name, {})
        entry[name] = {part: before.get(part, 0.0) + x for part, x in more[name].items()}
