"""Which sparse attention keeps the accuracy of dense attention on real data?

    make experiments NAME=attention_images
    make experiments NAME=attention_text

"attention_images" trains the classifier of `configs/fashion_mnist.py:attention`: 196 patches of
2 x 2 pixels in blocks of 7, so that a row of the image is two blocks. "attention_text" trains two
layers of the decoder of `configs/fst_small.py`, with 256 bytes of source text in blocks of 16.
Nobody knows which blocks these tasks need, unlike those of `copying.py`.
"""

import pathlib

from benchmarks.experiments.attention_patterns import make_experiment
from benchmarks.experiments.pattern_pictures import draw_kept
from benchmarks.experiments.tables import Groups


def _report_images(groups: Groups, results_dir: pathlib.Path) -> str:
    draw_kept(groups, results_dir / "attention_images_patterns.png")
    return ""


ATTENTION_IMAGES = make_experiment(
    "attention_images",
    "configs/fashion_mnist.py:attention",
    seeds=range(8),
    changes={"eval_every_steps": 400, "checkpoint__every_steps": 800},
    report=_report_images,
)
ATTENTION_TEXT = make_experiment(
    "attention_text",
    "configs/fst_small.py",
    seeds=range(6),
    changes={
        "model__num_layers": 2,
        "model__block_size": 16,
        "eval_every_steps": 200,
        "checkpoint__every_steps": 400,
        "log_every_steps": 100,
    },
)
