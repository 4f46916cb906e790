"""SPION on byte-level IMDB reviews, two classes.

Command:   python train.py --config=configs/spion_text.py --workdir=runs/spion_text
Hardware:  one GPU; compiled for an H200, a step takes 8.7 GB dense and 0.6 GB sparse
Source:    released code of SPION (arXiv:2309.12578), its settings for this task
Expected:  not yet run
"""

from ml_collections import ConfigDict

from configs import lra


def get_config() -> ConfigDict:
    """Return the settings."""
    config = lra.get_config()
    config.num_micro_batches = 4
    config.num_steps = 30_000
    config.eval_every_steps = 200
    config.checkpoint.every_steps = 200

    config.model.num_layers = 2
    config.model.block_size = 64

    config.data.source = "tfds:imdb_reviews"
    config.data.sequence_length = 4096
    config.data.batch_size = 32
    config.data.truncate = True

    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 80

    config.recipe.name = "spion"
    config.recipe.spion.quantile = 0.99
    config.recipe.spion.probe_every_steps = 200
    return config
