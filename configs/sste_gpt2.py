"""S-STE on GPT-2: feed-forward weights 2:4 and continuous in the dense ones, from first to last.

Command:   python train.py --config=configs/sste_gpt2.py:124m --workdir=runs/sste_gpt2_124m
           with --config.data.source=text:/path/to/openwebtext; sizes 124m, 350m, 774m, 1558m
Hardware:  one H100 or H200
Source:    arXiv:2409.09099 and its released code: settings of FST without decay and dense finish;
           model and optimizer are those of configs/gpt2.py. Its FP8 products, which the released
           code simulates, are not followed: bfloat16.
Expected:  not yet run
"""

from ml_collections import ConfigDict

from configs import gpt2


def get_config(size="124m") -> ConfigDict:
    """Return the settings.

    Args:
      size: str, one of `gpt2.SIZES`.

    Raises:
      ValueError: if the size is unknown.
    """
    config = gpt2.get_config(size)
    config.recipe.name = "sste"
    config.recipe.sste.grad_pruning = "mvue"
    return config
