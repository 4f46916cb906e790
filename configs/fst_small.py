"""FST on the standard library's own sources: 2:4 sparse feed-forward layers, dense at the end.

Command:   python train.py --config=configs/fst_small.py --workdir=runs/fst_small
Hardware:  2 CPU cores, where sparse weights save no time: the products are dense ones of masked
           weights
Source:    arXiv:2404.01847, scaled down; decay_rate is what --mode=find_decay chooses here (mu
           0.75), and what is published for GPT-2 124M
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the settings."""
    config = base.get_config()
    config.num_steps = 400
    config.eval_every_steps = 100
    config.num_eval_batches = 8

    config.model.num_layers = 4
    config.model.model_dim = 128
    config.model.num_heads = 4
    config.model.mlp_dim = 512
    config.model.positions = "rotary"

    config.data.sequence_length = 256
    config.data.batch_size = 8

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_fraction = 0.1

    config.recipe.name = "fst"
    config.recipe.fst.decay_rate = 6e-5
    config.recipe.fst.refresh_steps = 10
    return config
