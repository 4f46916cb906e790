"""Draw a run while it trains."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsejax.report.metrics import read_metrics
from sparsejax.report.plots.training import plot_training

_SHARE = 0.01
# Of the first picture, which also loads fonts; known of the others.
_FIRST_SECONDS = 0.6


class TrainingPicture:
    """Draw `training.png` anew at validations, in at most a hundredth of the time.

    Args:
      workdir: folder of the run, which holds `metrics.jsonl`.
      title: str above the picture.
      clock: returns seconds.
    """

    def __init__(self, workdir: Path, title: str, clock: Callable[[], float] = time.perf_counter):
        self._workdir, self._title, self._clock = workdir, title, clock
        self._drawn_at, self._cost_seconds = clock(), _FIRST_SECONDS

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Draw, if the row is that of a validation and it is time.

        Args:
          step: int, steps done.
          row: JSON values by name.

        Raises:
          OSError: if the picture cannot be written.
        """
        del step
        began = self._clock()
        due = (began - self._drawn_at) * _SHARE >= self._cost_seconds
        if row["kind"] == "validation" and due:
            rows = read_metrics(self._workdir / "metrics.jsonl")
            plot_training(rows, path=self._workdir / "training.png", title=self._title)
            self._drawn_at = self._clock()
            self._cost_seconds = self._drawn_at - began

    def close(self) -> None:
        """Do nothing: the end of a run is drawn with its summary."""
