"""SAT on short ListOps: dense while it learns each layer's pattern, then block-sparse.

Command:   python train.py --config=configs/sat_quickstart.py --workdir=runs/sat_quickstart
Hardware:  2 CPU cores
Source:    ours, in the shape of the paper's models: width 64, 2 heads; sequences of 21 to 199
           symbols in 256 positions. Initial values, activation and schedule are ours, see
           configs/lra.py
"""

from ml_collections import ConfigDict

from configs import lra


def get_config() -> ConfigDict:
    """Return the settings."""
    config = lra.get_shape()
    config.num_steps = 600
    config.eval_every_steps = 100
    config.num_eval_batches = 40
    config.log_every_steps = 20
    config.checkpoint.every_steps = 200

    config.model.num_layers = 2
    config.model.block_size = 16
    config.model.dropout_rate = 0.0

    config.data.source = "listops:short"
    config.data.sequence_length = 256
    config.data.batch_size = 16

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_fraction = 0.1

    config.recipe.name = "sat"
    config.recipe.sat.density = 0.15
    return config
