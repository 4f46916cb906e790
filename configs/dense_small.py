"""Dense control of the quickstart: same model, data and steps, no sparsity.

Command:   python train.py --config=configs/dense_small.py --workdir=runs/dense_small
Hardware:  2 CPU cores
Source:    ours
Expected:  validation loss 2.40 (seed 0)
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """Return the settings."""
    config = quickstart.get_config()
    config.recipe.name = "dense"
    return config
