"""FST on WMT14 English-German: Transformer-base with 2:4 sparse feed-forward layers in both stacks.

Command:   python train.py --config=configs/fst_transformer_base.py --workdir=runs/fst_en_de
           with --config.data.source=pairs:/path/to/wmt14_en_de, a folder of train.src, train.tgt,
           validation.src and validation.tgt, one sentence per line
Hardware:  one H100 or H200; compiled for an H100, a step takes 24.0 GB
Source:    arXiv:2404.01847, whose code for this model was not released: decay_rate is the paper's,
           quoted from memory, grad_pruning and refresh_steps are those of its released models.
           Model, label smoothing and Adam are those of Transformer-base, arXiv:1706.03762;
           learning rate and warm-up are fairseq's usual ones for it
Expected:  not yet run; validation tells cross-entropy and accuracy per token, not BLEU
Departures from fairseq's transformer: pre-norm with a last norm in each stack instead of post-norm;
           learned positions instead of sinusoids; LeCun-normal kernels instead of Xavier-uniform;
           embeddings of standard deviation 0.02 that are not scaled; bfloat16 instead of float16
           with loss scaling. A batch is 1024 sentences whatever their length, about as many tokens
           as the published 25,000 on each side; sentences are cut to 128 tokens, where fairseq
           forms batches by length
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the settings."""
    config = base.get_config()
    config.num_steps = 100_000
    config.num_micro_batches = 4
    config.eval_every_steps = 1_000
    config.num_eval_batches = 0
    config.log_every_steps = 50
    config.label_smoothing = 0.1

    config.model.vocab_size = 32_896  # 32,769 rounded up to a multiple of 128
    config.model.num_layers = 6
    config.model.num_decoder_layers = 6
    config.model.model_dim = 512
    config.model.num_heads = 8
    config.model.mlp_dim = 2048
    config.model.mlp_activation = "relu"
    config.model.dropout_rate = 0.1
    config.model.dtype = "bfloat16"

    config.data.source = "pairs:~/data/wmt14_en_de"
    config.data.tokenizer = "bpe:32768"
    config.data.sequence_length = 128
    config.data.batch_size = 1024
    config.data.truncate = True
    config.data.num_reading_threads = 1

    config.optimizer.learning_rate = 7e-4
    config.optimizer.schedule = "inverse_sqrt"
    config.optimizer.warmup_fraction = 0.04
    config.optimizer.weight_decay = 0.0
    config.optimizer.b2 = 0.98
    config.optimizer.clip_norm = None

    config.recipe.name = "fst"
    config.recipe.fst.sparse_weights = "(decoder/)?mlp/.*=2:4 transposable"
    config.recipe.fst.decay_rate = 1e-6
    config.recipe.fst.refresh_steps = 40
    config.recipe.fst.grad_pruning = "mvue"

    config.checkpoint.every_steps = 1_000
    return config
