"""SPION where one knows which blocks attention needs: the second half copies the first.

Command:   python train.py --config=configs/copying.py:hidden_permutation --workdir=runs/copying
           or fixed_lag, associative_recall after the colon; with
           --config.recipe.name=dense the dense control
Hardware:  one CPU core
Source:    ours; blocks of the copy are blocks of the pattern
Expected:  hidden_permutation: accuracy 1.000 with a seventh of the blocks, seed 0
"""

from ml_collections import ConfigDict

from configs import base

TASKS = ("hidden_permutation", "fixed_lag", "associative_recall")


def get_config(task: str = "hidden_permutation") -> ConfigDict:
    """Return the settings of a task.

    Args:
      task: one of `TASKS`.
    """
    config = base.get_config()
    config.num_steps = 400
    config.eval_every_steps = 100
    config.num_eval_batches = 8
    config.log_every_steps = 50

    config.data.source = f"copying:{task}"
    config.data.sequence_length = 64
    config.data.batch_size = 64
    config.data.copy_block = 4

    config.model.num_layers = 1
    config.model.model_dim = 48
    config.model.num_heads = 2
    config.model.mlp_dim = 96
    config.model.block_size = 4

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_fraction = 0.05

    config.recipe.name = "spion"
    config.recipe.spion.variant = "c"
    config.recipe.spion.density = 0.15
    # Of some positions more than a block: the published 31 are half of the sequence.
    config.recipe.spion.filter_size = 5
    config.recipe.spion.probe_interval_fraction = 0.05
    config.recipe.spion.latest_switch_fraction = 0.5

    config.checkpoint.every_steps = 100
    return config
