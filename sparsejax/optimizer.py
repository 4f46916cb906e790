"""Clipping, update direction and learning rate as three separate pure pieces.

They are separate because recipes act between them: terms are added to the gradient after
clipping, and a phase may restart, scale or hold the learning rate without touching moments.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from sparsejax.checks import check_used, make_check
from sparsejax.recipes import Phase
from sparsejax.shares import count_share
from sparsejax.types import PyTree

type Schedule = Literal["cosine", "one_cycle", "inverse_sqrt", "wsd", "constant", "triangle"]
"""How the learning rate moves, see `OptimizerConfig`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of the optimizer.

    Attributes:
      name: "adamw", "lion" or "sgd".
      learning_rate: float, peak rate.
      schedule: "cosine", "one_cycle" (linear up, linear down), "inverse_sqrt" (as one over the
        root of the step), "wsd" (the peak, then linear down at the end) or "constant", each after a
        linear warm-up; or "triangle", linear up and linear down to 0.
      warmup_fraction: float in [0, 1), share of the run from the initial to the peak rate.
      final_fraction: float in [0, 1], last rate of "cosine" and "wsd" relative to the peak.
      decay_fraction: float in (0, 1], share of the run, at its end, in which "wsd" falls.
      initial_fraction: float in [0, 1], first rate of "triangle" relative to the peak.
      weight_decay: float, decoupled, on kernels and token embeddings only.
      b1: float, decay of the first moment (momentum of "sgd").
      b2: float, decay of the second moment.
      eps: float, added to the root of the second moment.
      clip_norm: float or None, largest global norm of the gradient.
      clip_value: float or None, largest magnitude of a gradient entry.

    Raises:
      ValueError: if a setting is out of range.
    """

    name: Literal["adamw", "lion", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Schedule = "cosine"
    warmup_fraction: float = 0.1
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    initial_fraction: float = 0.0
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    clip_value: float | None = None

    def __post_init__(self):
        check = make_check("optimizer", self)
        check(self.name in ("adamw", "lion", "sgd"), "name", "'adamw', 'lion' or 'sgd'")
        check(self.learning_rate > 0, "learning_rate", "positive")
        schedules = get_args(Schedule.__value__)
        check(self.schedule in schedules, "schedule", f"one of {schedules}")
        if self.schedule == "inverse_sqrt":
            check(0 < self.warmup_fraction < 1, "warmup_fraction", "in (0, 1)")
        else:
            check(0 <= self.warmup_fraction < 1, "warmup_fraction", "in [0, 1)")
        check(0 <= self.final_fraction <= 1, "final_fraction", "in [0, 1]")
        check(0 < self.decay_fraction <= 1, "decay_fraction", "in (0, 1]")
        check(0 <= self.initial_fraction <= 1, "initial_fraction", "in [0, 1]")
        check(self.weight_decay >= 0, "weight_decay", "at least 0")
        check(0 <= self.b1 < 1, "b1", "in [0, 1)")
        check(0 <= self.b2 < 1, "b2", "in [0, 1)")
        check(self.eps > 0, "eps", "positive")
        check(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "positive or None")
        check_used(
            "optimizer",
            self,
            {
                "final_fraction": ("schedule", ("cosine", "wsd")),
                "decay_fraction": ("schedule", ("wsd",)),
                "initial_fraction": ("schedule", ("triangle",)),
                "b2": ("name", ("adamw", "lion")),
                "eps": ("name", ("adamw",)),
            },
        )
        check(self.clip_value is None or self.clip_value > 0, "clip_value", "positive or None")


class Optimizer(NamedTuple):
    """Optax pieces of one run.

    Attributes:
      clip: grads -> grads.
      init: params -> opt_state.
      update: (grads, opt_state, params) -> (updates, opt_state) for a learning rate of 1.
      schedule: i32[] steps done -> f32[] learning rate.
      base_learning_rate: float, the peak rate.
    """

    clip: Callable[[PyTree], PyTree]
    init: Callable[[PyTree], optax.OptState]
    update: Callable[[PyTree, optax.OptState, PyTree], tuple[PyTree, optax.OptState]]
    schedule: optax.Schedule
    base_learning_rate: float


def make_optimizer(config: OptimizerConfig, *, num_steps: int) -> Optimizer:
    """Build the pieces.

    Args:
      num_steps: int, length of the schedule.

    Raises:
      ValueError: if the warm-up is as long as the run, or reaches into the decay of "wsd".
    """
    warmup_steps = count_share(config.warmup_fraction, num_steps)
    if config.schedule != "constant" and warmup_steps >= num_steps:
        raise ValueError(
            f"optimizer.warmup_fraction must leave a step of {num_steps}, got "
            f"{config.warmup_fraction}, which is {warmup_steps} steps"
        )
    clips = []
    if config.clip_value is not None:
        clips.append(optax.clip(config.clip_value))
    if config.clip_norm is not None:
        clips.append(optax.clip_by_global_norm(config.clip_norm))
    clip = optax.chain(*clips) if clips else optax.identity()

    direction = {
        "adamw": lambda: optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        "lion": lambda: optax.scale_by_lion(b1=config.b1, b2=config.b2),
        "sgd": lambda: optax.trace(config.b1) if config.b1 else optax.identity(),
    }[config.name]()
    descent = optax.chain(
        direction,
        optax.add_decayed_weights(config.weight_decay, mask=_is_matrix),
        optax.scale(-1.0),
    )
    return Optimizer(
        clip=lambda grads: clip.update(grads, clip.init(grads))[0],
        init=descent.init,
        update=descent.update,
        schedule=_make_schedule(config, num_steps),
        base_learning_rate=config.learning_rate,
    )


def _is_matrix(params: PyTree) -> PyTree:
    # By name, not by rank: biases and norm scales of stacked layers have two axes as well.
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) in ("kernel", "embedding"), params
    )


def _make_schedule(config: OptimizerConfig, num_steps: int):
    peak, warmup = config.learning_rate, count_share(config.warmup_fraction, num_steps)
    if config.schedule == "constant":
        return optax.join_schedules(
            [optax.linear_schedule(0.0, peak, max(warmup, 1)), optax.constant_schedule(peak)],
            [warmup],
        )
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=warmup,
            decay_steps=num_steps,
            end_value=peak * config.final_fraction,
        )
    if config.schedule == "wsd":
        # Hu et al., MiniCPM, arXiv:2404.06395; its end is linear here.
        decay_step = num_steps - count_share(config.decay_fraction, num_steps)
        if warmup > decay_step:
            raise ValueError(
                "optimizer.warmup_fraction must end before optimizer.decay_fraction begins, at "
                f"step {decay_step} of {num_steps}, got {config.warmup_fraction}: {warmup} steps"
            )
        return optax.join_schedules(
            [
                optax.linear_schedule(0.0, peak, max(warmup, 1)),
                optax.constant_schedule(peak),
                optax.linear_schedule(
                    peak, peak * config.final_fraction, max(num_steps - decay_step, 1)
                ),
            ],
            [warmup, decay_step],
        )
    if config.schedule == "inverse_sqrt":
        # Vaswani et al., arXiv:1706.03762, equation 3, scaled to the peak.
        return lambda step: (
            peak * jnp.minimum(step / warmup, jnp.sqrt(warmup / jnp.maximum(step, 1)))
        )
    # The division by 25 at the start and by 25e4 at the end are the defaults of the one-cycle
    # policy that SPION and SAT train with.
    first, last = peak / 25, peak / 25e4
    if config.schedule == "triangle":
        first, last = peak * config.initial_fraction, 0.0
    return optax.join_schedules(
        [
            optax.linear_schedule(first, peak, max(warmup, 1)),
            optax.linear_schedule(peak, last, num_steps - warmup),
        ],
        [warmup],
    )


def compute_learning_rate(
    optimizer: Optimizer, phase: Phase, step: jax.Array, phase_start_step: jax.Array
) -> jax.Array:
    """Return the rate of one step, as its phase wants it.

    Args:
      phase: Phase, static.
      step: i32[], steps done before this one.
      phase_start_step: i32[], steps done when the phase began.

    Returns:
      f32[], rate per step.
    """
    if phase.learning_rate == "constant":
        rate = jnp.float32(optimizer.base_learning_rate)
    elif phase.learning_rate == "restart":
        rate = optimizer.schedule(step - phase_start_step)
    else:
        rate = optimizer.schedule(step)
    return jnp.asarray(rate * phase.learning_rate_scale, jnp.float32)
