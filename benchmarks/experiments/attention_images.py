"""Which sparse attention keeps the accuracy of dense attention on real images?

    make experiments NAME=attention_images

Model, data and number of steps are those of `configs/fashion_mnist.py:attention`: 196 patches of
2 x 2 pixels in blocks of 7, so that a row of the image is two blocks. Nobody knows which blocks the
task needs, unlike those of `copying.py`.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.experiments.attention_patterns import make_experiment
from benchmarks.experiments.pattern_pictures import draw_kept


def _report(groups: Mapping[str, Sequence[Mapping[str, Any]]], results_dir: pathlib.Path) -> str:
    draw_kept(groups, results_dir / "attention_images_patterns.png")
    return ""


ATTENTION_IMAGES = make_experiment(
    "attention_images",
    "configs/fashion_mnist.py:attention",
    seeds=range(8),
    changes={"eval_every_steps": 400, "checkpoint__every_steps": 800},
    report=_report,
)
