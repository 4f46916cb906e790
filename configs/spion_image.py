"""SPION on CIFAR-10 as sequences of grey pixels, ten classes.

Command:   python train.py --config=configs/spion_image.py --workdir=runs/spion_image
Hardware:  one GPU; compiled for an H200, a step takes 5.0 GB dense and 1.1 GB sparse
Source:    released code of SPION (arXiv:2309.12578), its settings for this task
Expected:  not yet run
"""

from ml_collections import ConfigDict

from configs import lra


def get_config() -> ConfigDict:
    """Return the settings."""
    config = lra.get_config()
    config.num_micro_batches = 2
    config.num_steps = 10_000
    config.eval_every_steps = 500
    config.checkpoint.every_steps = 500

    config.model.num_layers = 2
    config.model.block_size = 32

    config.data.source = "tfds:cifar10"
    config.data.sequence_length = 1024
    config.data.batch_size = 128

    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 175

    config.recipe.name = "spion"
    config.recipe.spion.quantile = 0.96
    config.recipe.spion.probe_every_steps = 500
    return config
