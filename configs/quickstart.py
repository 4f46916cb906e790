"""SPION where one can see what is right: the second half is the first, its blocks permuted.

Command:   python train.py --config=configs/quickstart.py --workdir=runs/quickstart
Hardware:  2 CPU cores, 2 to 4 minutes
Source:    ours; sizes chosen so that attention dominates the dense step
Expected:  accuracy of 1; the pattern is the diagonal and the eight blocks of the permutation; the
           sparse step is about 3.5 times faster
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the settings."""
    config = base.get_config()
    config.num_steps = 320
    config.eval_every_steps = 80
    config.num_eval_batches = 4
    config.log_every_steps = 10

    # Eight blocks of 64 symbols, and a copy of each at a place that all sequences share, but that
    # nobody tells the model.
    config.data.source = "copying:hidden_permutation"
    config.data.sequence_length = 1024
    config.data.batch_size = 16
    config.data.copy_block = 64
    config.data.copy_examples = 10_000

    config.model.num_layers = 1
    config.model.model_dim = 64
    config.model.num_heads = 2
    config.model.mlp_dim = 128
    config.model.block_size = 64

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_fraction = 0.05

    config.recipe.name = "spion"
    # The permutation lies on no diagonal, which the flood fill of "cf" would follow.
    config.recipe.spion.variant = "c"
    config.recipe.spion.density = 0.1
    config.recipe.spion.probe_interval_fraction = 40 / 320
    config.recipe.spion.max_change_percent = 5
    config.recipe.spion.latest_switch_fraction = 240 / 320

    config.checkpoint.every_steps = 80
    return config
