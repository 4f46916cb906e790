"""GPT-2 124M, dense: the control run at the size that sparse pre-training is compared at.

Command:   python train.py --config=configs/gpt2_124m_dense.py --workdir=runs/gpt2_124m_dense
           with --config.data.source=text:/path/to/openwebtext
Hardware:  one H100 or H200; compiled for an H200, a step takes 12.7 GB
Source:    schedule, batch and optimizer of arXiv:2404.01847 for GPT-2 on OpenWebText
Expected:  not yet run
"""

from configs import base


def get_config():
    """Return the settings.

    Returns:
      ConfigDict.
    """
    config = base.get_config()
    config.num_steps = 300_000
    config.num_micro_batches = 16
    config.eval_every_steps = 1_000
    config.num_eval_batches = 20
    config.log_every_steps = 20

    config.model.vocab_size = 50_304  # 50,257 rounded up to a multiple of 128
    config.model.num_layers = 12
    config.model.model_dim = 768
    config.model.num_heads = 12
    config.model.mlp_dim = 3072
    config.model.init_std = 0.02
    config.model.dtype = "bfloat16"
    config.model.remat = True

    config.data.source = "text:data/openwebtext"
    config.data.tokenizer = "bpe:50257"
    config.data.sequence_length = 1024
    config.data.batch_size = 512
    config.data.num_reading_threads = 1

    config.optimizer.learning_rate = 1.5e-4
    config.optimizer.warmup_steps = 3_000
    config.optimizer.final_fraction = 1e-5 / 1.5e-4

    config.checkpoint.every_steps = 1_000
    return config
