"""Which sparse attention keeps the accuracy of dense attention on real images?

    make experiments NAME=attention_images

Model, data and number of steps are those of `configs/fashion_mnist.py:attention`: 196 patches of
2 x 2 pixels in blocks of 7, so that a row of the image is two blocks. Nobody knows which blocks the
task needs, unlike those of `copying.py`.
"""

from benchmarks.experiments.attention_patterns import make_experiment

ATTENTION_IMAGES = make_experiment(
    "attention_images",
    "configs/fashion_mnist.py:attention",
    seeds=range(8),
    changes={"eval_every_steps": 400, "checkpoint__every_steps": 800},
)
