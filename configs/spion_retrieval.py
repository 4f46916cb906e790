"""SPION on document matching (ACL Anthology Network), two documents per example.

Command:   python train.py --config=configs/spion_retrieval.py --workdir=runs/spion_retrieval
           with --config.data.source=aan:/path/to/lra_release/tsv_data
Hardware:  one GPU of 24 GB or more
Source:    released code of SPION (arXiv:2309.12578), its settings for this task
Expected:  not yet run
"""

from ml_collections import ConfigDict

from configs import lra


def get_config() -> ConfigDict:
    """Return the settings."""
    config = lra.get_config()
    config.num_micro_batches = 8
    config.num_steps = 40_000
    config.eval_every_steps = 200
    config.checkpoint.every_steps = 200

    config.model.num_layers = 2
    config.model.block_size = 64

    config.data.source = "aan:data/aan"
    config.data.sequence_length = 4096
    config.data.batch_size = 32
    config.data.truncate = True

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 800

    config.recipe.name = "spion"
    config.recipe.spion.quantile = 0.99
    config.recipe.spion.probe_every_steps = 200
    return config
