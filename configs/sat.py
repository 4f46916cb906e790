"""SAT on its six tasks, with the published settings.

Command:   python train.py --config=configs/sat.py:image --workdir=runs/sat_image
           or nature, news, yelp, listops, retrieval after the colon;
           with --config.recipe.name=dense the dense control
Hardware:  one GPU; compiled for an H200 before GELU was exact and dropout followed it, a dense step
           takes 6.5 GB (news) to 12.0 GB (listops)
Source:    released code of "Exploring Attention Sparsity to Accelerate Transformer Training on
           GPUs" (IEEE Access 12, 2024, doi:10.1109/ACCESS.2024.3425638)
Expected:  not yet run

Published are fp16 activations beside attention in float32, which cannot be set apart here: both are
bfloat16. The switch needs a skewness of 1.7 and a change below 1.3 % everywhere but in some logs:
1.9 for nature, and 3.0 for yelp, which then never switched. Published sequences of 1000 or 4000
tokens are padded to a power of two; ours fill it.
"""

from ml_collections import ConfigDict

from configs import lra


def get_config(task="image") -> ConfigDict:
    """Return the settings of one task.

    Args:
      task: str, "image", "nature", "news", "yelp", "listops" or "retrieval".

    Raises:
      ValueError: if there is no such task.
    """
    tasks = (image, nature, news, yelp, listops, retrieval)
    by_name = {function.__name__: function for function in tasks}
    if task not in by_name:
        raise ValueError(f"sat.py:{task}: expected one of {', '.join(by_name)}")
    return by_name[task]()


def image() -> ConfigDict:
    """Return CIFAR-10 as sequences of grey pixels, ten classes.

    45,000 images to train, 5,000 to validate; 2 layers, 1024 positions, blocks of 32, batches of
    512, rate 2e-3 after 175 steps, 10,000 steps, validated every 500.
    """
    config = _get_config(
        density=0.05, num_layers=2, block_size=32, num_steps=10_000, eval_every_steps=500
    )
    config.num_micro_batches = 4

    config.data.source = "tfds:cifar10"
    config.data.train_split = "train[:90%]"
    config.data.validation_split = "train[90%:]"
    config.data.sequence_length = 1024
    config.data.batch_size = 512

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_fraction = 175 / 10_000
    return config


def nature() -> ConfigDict:
    """Return photographs of living things as sequences of grey pixels, fourteen classes.

    437,513 images to train, 24,426 to validate, fourteen labels: these numbers are iNaturalist
    2018's. How they became 1000 tokens is not published; ours are scaled to 32 x 32. 2 layers,
    blocks of 32, batches of 512, rate 3e-3 after 800 steps, 10,000 steps, validated every 500. To
    prepare the set, TFDS needs TensorFlow.
    """
    config = _get_config(
        density=0.04, num_layers=2, block_size=32, num_steps=10_000, eval_every_steps=500
    )
    config.num_micro_batches = 4

    config.data.source = "tfds:i_naturalist2018"
    config.data.label_key = "supercategory"
    config.data.validation_split = "validation"
    config.data.image_size = 32
    config.data.sequence_length = 1024
    config.data.batch_size = 512

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_fraction = 800 / 10_000
    return config


def news() -> ConfigDict:
    """Return AG News, bytes of the descriptions, four classes.

    120,000 texts to train, 7,600 to validate, 1000 tokens of each; 4 layers, blocks of 32, batches
    of 512, rate 9e-4 after 80 steps, 30,000 steps, validated every 200. Whether titles were read
    too is not published.
    """
    config = _get_config(
        density=0.08, num_layers=4, block_size=32, num_steps=30_000, eval_every_steps=200
    )
    config.num_micro_batches = 8

    config.data.source = "tfds:ag_news_subset"
    config.data.sequence_length = 1024
    config.data.batch_size = 512
    config.data.truncate = True

    config.optimizer.learning_rate = 9e-4
    config.optimizer.warmup_fraction = 80 / 30_000
    return config


def yelp() -> ConfigDict:
    """Return Yelp reviews, bytes, two classes.

    560,000 texts to train, 38,000 to validate, 1000 tokens of each; 4 layers, blocks of 32, batches
    of 512, rate 7e-4 after 80 steps, 30,000 steps, validated every 200.
    """
    config = _get_config(
        density=0.05, num_layers=4, block_size=32, num_steps=30_000, eval_every_steps=200
    )
    config.num_micro_batches = 8

    config.data.source = "tfds:yelp_polarity_reviews"
    config.data.sequence_length = 1024
    config.data.batch_size = 512
    config.data.truncate = True

    config.optimizer.learning_rate = 7e-4
    config.optimizer.warmup_fraction = 80 / 30_000
    return config


def listops() -> ConfigDict:
    """Return Long Range Arena ListOps, ten classes.

    96,000 expressions to train, 2,000 to validate, of up to 2000 tokens; 4 layers, blocks of 64,
    batches of 128, rate 8e-4 after 1000 steps (6e-4 in the released logs), 30,000 steps, validated
    every 500.
    """
    config = _get_config(
        density=0.04, num_layers=4, block_size=64, num_steps=30_000, eval_every_steps=500
    )
    config.num_micro_batches = 4

    config.data.source = "listops"
    config.data.sequence_length = 2048
    config.data.batch_size = 128

    config.optimizer.learning_rate = 8e-4
    config.optimizer.warmup_fraction = 1_000 / 30_000
    return config


def retrieval() -> ConfigDict:
    """Return document matching (ACL Anthology Network), two documents per example, two classes.

    147,086 pairs to train, 18,090 to validate, 4000 tokens of each document; 2 layers, blocks of
    64, batches of 32, rate 5e-4 after 800 steps, 40,000 steps, validated every 200. Set
    `data.source` to aan:/path/to/lra_release/tsv_data.
    """
    config = _get_config(
        density=0.021, num_layers=2, block_size=64, num_steps=40_000, eval_every_steps=200
    )
    config.num_micro_batches = 8

    config.data.source = "aan:data/aan"
    config.data.sequence_length = 4096
    config.data.batch_size = 32
    config.data.truncate = True

    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_fraction = 800 / 40_000
    return config


def _get_config(*, density, num_layers, block_size, num_steps, eval_every_steps):
    config = lra.get_config()
    config.num_steps = num_steps
    config.eval_every_steps = eval_every_steps
    # The published test accuracy is that of the checkpoint with the best validation.
    config.checkpoint.every_steps = eval_every_steps
    config.model.num_layers = num_layers
    config.model.block_size = block_size
    config.model.dtype = "bfloat16"
    config.recipe.name = "sat"
    config.recipe.sat.density = density
    return config
