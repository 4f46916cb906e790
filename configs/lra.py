"""What the configs of SPION's and SAT's tasks share; no run of its own."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the model and optimizer that SPION and SAT train on every task.

    `get_shape`, and what their released code leaves to PyTorch: linear layers begin uniform within
    1 / sqrt(inputs), biases too; GELU is exact, and dropout follows it; the schedule is OneCycleLR,
    which cycles Adam's b1 from 0.95 to 0.85 and back by default.
    """
    config = get_shape()
    config.model.linear_init = "torch"
    config.model.mlp_activation = "gelu_exact"
    config.model.mlp_dropout_rate = 0.1

    config.optimizer.schedule = "torch_one_cycle"
    config.optimizer.cycle_momentum = True
    return config


def get_shape() -> ConfigDict:
    """Return their sizes and the settings of their optimizer.

    Two heads of 32, width 64, feed-forward 128, pre-LN, learned positions, mean pooling,
    dropout 0.1; AdamW (0.9, 0.999), eps 1e-6, no decay, gradient values clipped at 1; one-cycle
    schedule, linear both ways. Source: the released code of arXiv:2309.12578 and
    doi:10.1109/ACCESS.2024.3425638, which runs attention in float32 and the rest in mixed
    precision.
    """
    config = base.get_config()
    config.num_eval_batches = 0
    config.log_every_steps = 50

    config.model.model_dim = 64
    config.model.num_heads = 2
    config.model.mlp_dim = 128
    config.model.positions = "learned"
    config.model.dropout_rate = 0.1

    config.optimizer.schedule = "one_cycle"
    config.optimizer.weight_decay = 0.0
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-6
    config.optimizer.clip_norm = None
    config.optimizer.clip_value = 1.0
    return config
