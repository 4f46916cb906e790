"""GPT-2 124M with SPION attention, our causal extension of the published encoder method.

Command:   python train.py --config=configs/gpt2_124m_spion.py --workdir=runs/gpt2_124m_spion
           with --config.data.source=text:/path/to/openwebtext
Hardware:  one H100 or H200; compiled for an H200 with biases and GELU in its tanh form, a step
           takes 12.7 GB
Source:    configs/gpt2.py; the sparsity settings are ours
Expected:  not yet run
"""

from ml_collections import ConfigDict

from configs import gpt2


def get_config() -> ConfigDict:
    """Return the settings."""
    config = gpt2.get_config()
    config.recipe.name = "spion"
    config.recipe.spion.quantile = 0.8
    config.recipe.spion.probe_interval_fraction = 1 / 300
    # A second warm-up in the middle of a cosine schedule is not what this model is trained with.
    config.recipe.spion.restart_learning_rate = False
    return config
