"""Llama-shaped models on one's own text, from their pretrained weights or from nothing.

Command:   python train.py --config=configs/llama.py:smollm2_135m --workdir=runs/smollm2
           with --config.model.init_from=/path/to/model.gguf, or a folder of transformers,
           --config.data.source=text:/path/to/texts, --config.data.tokenizer=file:/path/to/folder of
           its tokenizer.json; sizes smollm2_135m, llama3_1b, llama3_8b
Hardware:  one H100 or H200; llama3_8b on a mesh of several, such as --config.mesh.fsdp=8
Source:    shapes of SmolLM2-135M, Llama 3.2 1B and Llama 3 8B; schedule and batch are ours, for
           further training
Expected:  not yet run
"""

from ml_collections import ConfigDict

from configs import base

SIZES = {
    # name: (layers, width, heads, key/value heads, hidden width, tokens)
    "smollm2_135m": (30, 576, 9, 3, 1536, 49_152),
    "llama3_1b": (16, 2048, 32, 8, 8192, 128_256),
    "llama3_8b": (32, 4096, 32, 8, 14_336, 128_256),
}


def get_config(size="smollm2_135m") -> ConfigDict:
    """Return the settings.

    Args:
      size: str, one of `SIZES`; given on the command line after the file's name and a colon.

    Raises:
      ValueError: if the size is unknown.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {list(SIZES)}, got {size!r}")
    config = base.get_config()
    config.num_steps = 1_000
    config.num_micro_batches = 8
    config.eval_every_steps = 100

    layers, width, heads, kv_heads, hidden, tokens = SIZES[size]
    config.model.num_layers, config.model.model_dim, config.model.mlp_dim = layers, width, hidden
    config.model.num_heads, config.model.num_kv_heads = heads, kv_heads
    config.model.vocab_size = tokens
    config.model.mlp_activation = "swiglu"
    config.model.norm = "rms"
    config.model.use_bias = False
    config.model.positions = "rotary"
    config.model.rotary_wavelength = 100_000.0 if size == "smollm2_135m" else 500_000.0
    if size == "llama3_1b":
        config.model.rotary_scaling = "llama3"
        config.model.rotary_factor = 32.0
    config.model.tied_head = size != "llama3_8b"
    config.model.init_std = 0.02
    config.model.dtype = "bfloat16"
    config.model.remat = True

    config.data.source = "text:data/texts"
    config.data.tokenizer = "file:data/tokenizer"
    config.data.sequence_length = 2048
    config.data.batch_size = 64

    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_fraction = 0.05
    return config
