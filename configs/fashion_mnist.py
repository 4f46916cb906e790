"""Small classifiers of real images: SPION on small patches, or FST on larger ones.

Command:   python train.py --config=configs/fashion_mnist.py:attention --workdir=runs/fashion
           or weights after the colon; with --config.recipe.name=dense the dense control. The images
           are those of apt install dataset-fashion-mnist; --config.data.source=idx:/FOLDER for
           others in MNIST's format
Hardware:  one CPU core
Source:    ours, on Fashion-MNIST (arXiv:1708.07747): 60,000 grey images of 28 x 28 pixels
Expected:  attention: accuracy 0.76 on 2,048 of the test images after 3 minutes, with 14 % of the
           blocks from step 240 on, seed 0; weights: not yet run
"""

from ml_collections import ConfigDict

from configs import base

TASKS = ("attention", "weights")


def get_config(task: str = "attention") -> ConfigDict:
    """Return the settings of a task.

    Args:
      task: one of `TASKS`.

    Raises:
      ValueError: if it is another.
    """
    if task not in TASKS:
        raise ValueError(f"fashion_mnist.py:{task}: expected one of {', '.join(TASKS)}")
    config = base.get_config()
    config.num_steps = 800
    config.eval_every_steps = 200
    config.num_eval_batches = 64
    config.log_every_steps = 100

    config.data.source = "idx:/usr/share/datasets/fashion-mnist"
    config.data.image_channels = 1

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_fraction = 0.05
    config.checkpoint.every_steps = 400

    if task == "attention":
        # A row of 14 patches is two blocks.
        config.data.patch_size = 2
        config.data.sequence_length = 196
        config.data.batch_size = 32
        config.model.num_layers = 2
        config.model.model_dim = 48
        config.model.num_heads = 2
        config.model.mlp_dim = 96
        config.model.block_size = 7
        config.recipe.name = "spion"
        config.recipe.spion.variant = "c"
        config.recipe.spion.density = 0.15
        config.recipe.spion.filter_size = 5
        config.recipe.spion.probe_interval_fraction = 0.05
        config.recipe.spion.latest_switch_fraction = 0.5
    else:
        config.data.patch_size = 4
        config.data.sequence_length = 49
        config.data.batch_size = 64
        config.model.num_layers = 4
        config.model.model_dim = 64
        config.model.num_heads = 4
        config.model.mlp_dim = 256
        config.model.block_size = 49
        config.recipe.name = "fst"
        config.recipe.fst.decay_rate = 6e-5
        config.recipe.fst.refresh_steps = 10
    return config
