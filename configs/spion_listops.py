"""SPION on Long Range Arena ListOps: nested list operations, ten classes.

Command:   python train.py --config=configs/spion_listops.py --workdir=runs/spion_listops
Hardware:  one GPU; compiled for an H200, a step takes 14.8 GB dense and 1.9 GB sparse
Source:    released code of SPION (arXiv:2309.12578), its settings for this task
Expected:  not yet run
"""

from ml_collections import ConfigDict

from configs import lra


def get_config() -> ConfigDict:
    """Return the settings."""
    config = lra.get_config()
    config.num_micro_batches = 8
    config.num_steps = 30_000
    config.eval_every_steps = 500
    config.checkpoint.every_steps = 500

    config.model.num_layers = 4
    config.model.block_size = 64

    config.data.source = "listops"
    config.data.sequence_length = 2048
    config.data.batch_size = 256

    config.optimizer.learning_rate = 7e-4
    config.optimizer.warmup_steps = 1_000

    config.recipe.name = "spion"
    config.recipe.spion.quantile = 0.98
    config.recipe.spion.probe_every_steps = 500
    return config
