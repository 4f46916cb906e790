"""SPION on its five tasks, with the published settings.

Command:   python train.py --config=configs/spion.py:listops --workdir=runs/spion_listops
           or image, text, retrieval, pathfinder after the colon; retrieval
           with --config.data.source=aan:/path/to/lra_release/tsv_data;
           with --config.recipe.name=dense the dense control
Hardware:  one GPU; compiled for an H200 before GELU was exact and dropout followed it, a step
           takes, dense and sparse, listops 14.8 and 1.9 GB, image and pathfinder 5.0 and 1.1 GB,
           text 8.7 and 0.6 GB; retrieval 24 GB or more
Source:    released code of SPION (arXiv:2309.12578), its settings for each task; the pictures of
           pathfinder are of our own generator. Its CF and C train the first two steps, and the
           first after the switch, at the rate of the step before: late_schedule. Its F does not:
           --config.recipe.spion.variant=f --config.optimizer.late_schedule=False
Expected:  not yet run
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from configs import lra


class _Task(NamedTuple):
    source: str
    sequence_length: int
    batch_size: int
    num_micro_batches: int
    num_steps: int
    num_layers: int
    block_size: int
    learning_rate: float
    warmup_steps: int
    quantile: float
    # Steps between probes, validations and checkpoints.
    interval: int
    truncate: bool = False


TASKS = {
    # CIFAR-10 as sequences of grey pixels, ten classes.
    "image": _Task("tfds:cifar10", 1024, 128, 2, 10_000, 2, 32, 1e-4, 175, 0.96, 500),
    # Nested list operations, ten classes.
    "listops": _Task("listops", 2048, 256, 8, 30_000, 4, 64, 7e-4, 1_000, 0.98, 500),
    # Byte-level IMDB reviews, two classes.
    "text": _Task("tfds:imdb_reviews", 4096, 32, 4, 30_000, 2, 64, 1e-4, 80, 0.99, 200, True),
    # Two documents of the ACL Anthology Network: does one cite the other?
    "retrieval": _Task("aan:data/aan", 4096, 32, 8, 40_000, 2, 64, 3e-4, 800, 0.99, 200, True),
    # Do two circles mark the ends of one dashed path?
    "pathfinder": _Task("pathfinder", 1024, 256, 4, 50_000, 2, 32, 3e-4, 312, 0.96, 500),
}
"""By the name after the colon."""


def get_config(name: str = "listops") -> ConfigDict:
    """Return the settings of a task.

    Args:
      name: one of `TASKS`.

    Raises:
      ValueError: if there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"spion.py:{name}: expected one of {', '.join(TASKS)}")
    task, config = TASKS[name], lra.get_config()
    config.num_steps = task.num_steps
    config.num_micro_batches = task.num_micro_batches
    config.eval_every_steps = task.interval
    config.checkpoint.every_steps = task.interval

    config.model.num_layers = task.num_layers
    config.model.block_size = task.block_size

    config.data.source = task.source
    config.data.sequence_length = task.sequence_length
    config.data.batch_size = task.batch_size
    config.data.truncate = task.truncate

    config.optimizer.late_schedule = True
    config.optimizer.learning_rate = task.learning_rate
    config.optimizer.warmup_fraction = task.warmup_steps / task.num_steps

    config.recipe.name = "spion"
    config.recipe.spion.quantile = task.quantile
    config.recipe.spion.probe_interval_fraction = task.interval / task.num_steps
    return config
