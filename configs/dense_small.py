"""Dense control of the quickstart: same model, data and steps, no sparsity.

Command:   python train.py --config=configs/dense_small.py --workdir=runs/dense_small
Hardware:  2 CPU cores
Source:    ours
Expected:  validation loss 2.40 (seed 0)
"""

from configs import quickstart


def get_config():
    """Return the settings.

    Returns:
      ConfigDict.
    """
    config = quickstart.get_config()
    config.recipe.name = "dense"
    return config
