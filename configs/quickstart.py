"""SPION where one knows what attention should look like: the second half copies the first.

Command:   python train.py --config=configs/quickstart.py --workdir=runs/quickstart
Hardware:  2 CPU cores
Source:    ours; sizes chosen so that attention dominates the dense step
Expected:  accuracy of 1 after N minutes; the pattern is the diagonal and a stripe half a sequence
           beside it; the sparse step is N times faster
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the settings."""
    config = base.get_config()
    config.num_steps = 300
    config.eval_every_steps = 60
    config.num_eval_batches = 4
    config.log_every_steps = 10

    # Position t of the second half is hidden, and equals position t - 1024.
    config.data.source = "copying:fixed_lag"
    config.data.sequence_length = 2048
    config.data.batch_size = 2
    config.data.copy_block = 64
    config.data.copy_examples = 2000

    config.model.num_layers = 1
    config.model.model_dim = 128
    config.model.num_heads = 2
    config.model.mlp_dim = 256
    config.model.positions = "rotary"
    config.model.block_size = 64

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_fraction = 0.05

    config.recipe.name = "spion"
    config.recipe.spion.quantile = 0.95
    config.recipe.spion.probe_interval_fraction = 40 / 300
    config.recipe.spion.latest_switch_fraction = 160 / 300

    config.checkpoint.every_steps = 60
    return config
