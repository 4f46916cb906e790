"""MST on the standard library's own sources: weights 90 % sparse for most of the run, then dense.

Command:   python train.py --config=configs/mst_small.py --workdir=runs/mst_small
           --config.recipe.name=rigl (or set, magnitude, static, dense) trains the rivals;
           --config.recipe.mst.sparse_weights=.*=16x16 keeps weights in blocks, and
           --config.recipe.mst.attention_blocks=True attention too, which saves time
Hardware:  2 CPU cores, where unstructured weights save no time: the products are dense ones of
           masked weights, and FLOPs are counted, not spared
Source:    arXiv:2408.11746, scaled down; the schedule is ours. A topology lives for 20 of 400 steps
           and not for the released 100 of 600,000: 19 updates in all
"""

from configs import base


def get_config():
    """Return the settings.

    Returns:
      ConfigDict.
    """
    config = base.get_config()
    config.num_steps = 400
    config.eval_every_steps = 100
    config.num_eval_batches = 8

    config.model.num_layers = 4
    config.model.model_dim = 128
    config.model.num_heads = 4
    config.model.mlp_dim = 512
    config.model.positions = "rotary"
    config.model.block_size = 32

    config.data.sequence_length = 256
    config.data.batch_size = 8

    # The better one for MST of 3e-3 and 6e-3; for the dense model it is the other.
    config.optimizer.learning_rate = 6e-3
    config.optimizer.warmup_steps = 40

    config.recipe.name = "mst"
    # A quarter of the dense FLOPs with the head counted; so short a run gains from an early start
    # of the ultra-sparse phase and a long restoration.
    config.recipe.mst.warmup = 0.05
    config.recipe.mst.stairs = 1
    config.recipe.mst.restoration = 0.16
    config.recipe.mst.attention_stride = 16
    for name in ("mst", "rigl", "set", "magnitude"):
        config.recipe[name].update_interval = 20
    # The released 0.3 replaces more than so short a run can train: it ends 0.15 higher.
    for name in ("mst", "rigl", "set"):
        config.recipe[name].update_fraction = 0.05
    return config
