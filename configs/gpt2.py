"""GPT-2 on OpenWebText, dense: the control run that sparse pre-training is compared with.

Command:   python train.py --config=configs/gpt2.py:124m --workdir=runs/gpt2_124m
           with --config.data.source=text:/path/to/openwebtext; sizes 124m, 350m, 774m, 1558m
Hardware:  one H100 or H200
Source:    released code of arXiv:2404.01847, the same for all sizes: schedule, batch, optimizer,
           which decays all matrices, learned positions too; exact GELU; no biases, in norms neither
Expected:  not yet run
"""

from ml_collections import ConfigDict

from configs import base

SIZES = {
    # name: (layers, heads, width)
    "124m": (12, 12, 768),
    "350m": (24, 16, 1024),
    "774m": (36, 20, 1280),
    "1558m": (48, 25, 1600),
}


def get_config(size="124m") -> ConfigDict:
    """Return the settings.

    Args:
      size: str, one of `SIZES`; given on the command line after the file's name and a colon.

    Raises:
      ValueError: if the size is unknown.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {list(SIZES)}, got {size!r}")
    config = base.get_config()
    config.num_steps = 300_000
    config.num_micro_batches = 16
    config.eval_every_steps = 1_000
    config.num_eval_batches = 20
    config.log_every_steps = 20

    config.model.vocab_size = 50_304  # 50,257 rounded up to a multiple of 128
    config.model.num_layers, config.model.num_heads, config.model.model_dim = SIZES[size]
    config.model.mlp_dim = 4 * config.model.model_dim
    config.model.mlp_activation = "gelu_exact"
    config.model.use_bias = False
    config.model.use_norm_bias = False
    config.model.init_std = 0.02
    config.model.dtype = "bfloat16"
    config.model.remat = True

    config.data.source = "text:data/openwebtext"
    config.data.tokenizer = "bpe:50257"
    config.data.sequence_length = 1024
    config.data.batch_size = 512
    config.data.num_reading_threads = 1

    config.optimizer.learning_rate = 1.5e-4
    config.optimizer.warmup_fraction = 0.01
    config.optimizer.final_fraction = 1e-5 / 1.5e-4
    config.optimizer.decay_embeddings = "all"

    config.checkpoint.every_steps = 1_000
    return config
