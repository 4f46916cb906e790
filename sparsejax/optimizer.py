"""Clipping, update direction and learning rate as three separate pure pieces.

They are separate because recipes act between them: terms are added to the gradient after
clipping, and a phase may restart, scale or hold the learning rate without touching moments.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from sparsejax.checks import check_used, make_check
from sparsejax.recipes import Phase
from sparsejax.shares import count_share
from sparsejax.types import PyTree

type Schedule = Literal[
    "cosine", "one_cycle", "torch_one_cycle", "inverse_sqrt", "wsd", "constant", "triangle"
]
"""How the learning rate moves, see `OptimizerConfig`."""

type DecayedEmbeddings = Literal["none", "tokens", "all"]
"""Which embeddings weight decay reaches, see `OptimizerConfig`."""

# What weight decay reaches, by the name of a parameter: its rank tells less, for the biases and
# norm scales of stacked layers have two axes as well.
_DECAYED = {
    "none": ("kernel",),
    "tokens": ("kernel", "embedding"),
    "all": ("kernel", "embedding", "position"),
}

# The momenta of torch's one-cycle policy, by default.
_HIGHEST_B1, _LOWEST_B1 = 0.95, 0.85


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Settings of the optimizer.

    Attributes:
      name: "adamw", "lion" or "sgd".
      learning_rate: float, peak rate.
      schedule: "cosine", "one_cycle" (linear up, linear down), "inverse_sqrt" (as one over the
        root of the step), "wsd" (the peak, then linear down at the end) or "constant", each after a
        linear warm-up; or "triangle", linear up and linear down to 0. "torch_one_cycle" is
        "one_cycle" as PyTorch counts: the peak comes one step earlier, in the last step of the
        warm-up, and the last rate in the last step.
      cycle_momentum: bool, b1 falls from 0.95 to 0.85 while the rate of a one-cycle schedule rises,
        and rises while it falls, as in PyTorch; a phase at a constant rate has `b1`. "adamw" only.
      late_schedule: bool, every step has the rate and momentum of the step before, and the first
        its own. Where a phase restarts the schedule, only its first step is late. As the released
        loops of SPION-CF and C, which tell their scheduler the step they have done.
      warmup_fraction: float in [0, 1), share of the run from the initial to the peak rate.
      final_fraction: float in [0, 1], last rate of "cosine" and "wsd" relative to the peak.
      decay_fraction: float in (0, 1], share of the run, at its end, in which "wsd" falls.
      initial_fraction: float in [0, 1], rate of the first step relative to the peak, of all but the
        one-cycle schedules and "inverse_sqrt". With 0, as in the released code of FST and S-STE,
        the first step of a warm-up trains nothing.
      weight_decay: float, decoupled, on kernels and embeddings only.
      decay_embeddings: embeddings that it reaches: "none", "tokens", or "all", learned positions
        too.
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
    cycle_momentum: bool = False
    late_schedule: bool = False
    warmup_fraction: float = 0.1
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    initial_fraction: float = 0.0
    weight_decay: float = 0.1
    decay_embeddings: DecayedEmbeddings = "tokens"
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
        check(
            not self.cycle_momentum
            or (self.name == "adamw" and self.schedule in ("one_cycle", "torch_one_cycle")),
            "cycle_momentum",
            f"False for {self.name!r} with schedule {self.schedule!r}",
        )
        check(0 <= self.final_fraction <= 1, "final_fraction", "in [0, 1]")
        check(0 < self.decay_fraction <= 1, "decay_fraction", "in (0, 1]")
        check(0 <= self.initial_fraction <= 1, "initial_fraction", "in [0, 1]")
        check(self.weight_decay >= 0, "weight_decay", "at least 0")
        check(self.decay_embeddings in _DECAYED, "decay_embeddings", f"one of {(*_DECAYED,)}")
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
                "initial_fraction": ("schedule", ("cosine", "wsd", "constant", "triangle")),
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
      update: `(grads, opt_state, params, *, b1)` -> (updates, opt_state) for a learning rate of
        1; b1 is what `compute_b1` returns, by default `base_b1`.
      schedule: i32[] steps done -> f32[] learning rate.
      b1_schedule: i32[] steps done -> b1, a float where it stays the same, else f32[].
      base_learning_rate: float, the peak rate.
      base_b1: float, b1 of a phase at a constant rate.
      late_schedule: bool, steps are scheduled as if they were the one before.
    """

    clip: Callable[[PyTree], PyTree]
    init: Callable[[PyTree], optax.OptState]
    update: Callable[..., tuple[PyTree, optax.OptState]]
    schedule: optax.Schedule
    b1_schedule: optax.Schedule
    base_learning_rate: float
    base_b1: float
    late_schedule: bool


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

    def make_descent(b1: Any):
        direction = {
            "adamw": lambda: optax.scale_by_adam(b1=b1, b2=config.b2, eps=config.eps),
            "lion": lambda: optax.scale_by_lion(b1=b1, b2=config.b2),
            "sgd": lambda: optax.trace(config.b1) if config.b1 else optax.identity(),
        }[config.name]()
        return optax.chain(
            direction,
            optax.add_decayed_weights(config.weight_decay, mask=is_decayed),
            optax.scale(-1.0),
        )

    def is_decayed(params):
        names = _DECAYED[config.decay_embeddings]
        return jax.tree_util.tree_map_with_path(
            lambda path, _: getattr(path[-1], "key", None) in names, params
        )

    return Optimizer(
        clip=lambda grads: clip.update(grads, clip.init(grads))[0],
        init=make_descent(config.b1).init,
        # As torch's Adam, whose bias correction is that of the step's own b1: 1 - b1 ** step.
        update=lambda grads, opt_state, params, *, b1=config.b1: make_descent(b1).update(
            grads, opt_state, params
        ),
        schedule=_make_schedule(config, num_steps),
        b1_schedule=_make_b1_schedule(config, num_steps),
        base_learning_rate=config.learning_rate,
        base_b1=config.b1,
        late_schedule=config.late_schedule,
    )


def _make_b1_schedule(config: OptimizerConfig, num_steps: int):
    if not config.cycle_momentum:
        return lambda step: config.b1
    return _make_one_cycle(config, num_steps, _HIGHEST_B1, _LOWEST_B1, _HIGHEST_B1)


def _make_one_cycle(
    config: OptimizerConfig, num_steps: int, first: float, middle: float, last: float
):
    # PyTorch reaches both values a step earlier.
    early = 1 if config.schedule == "torch_one_cycle" else 0
    turn = max(count_share(config.warmup_fraction, num_steps) - early, 0)
    return optax.join_schedules(
        [
            optax.linear_schedule(first, middle, max(turn, 1)),
            optax.linear_schedule(middle, last, num_steps - early - turn),
        ],
        [turn],
    )


def _make_schedule(config: OptimizerConfig, num_steps: int):
    peak, warmup = config.learning_rate, count_share(config.warmup_fraction, num_steps)
    first = peak * config.initial_fraction
    rise = optax.linear_schedule(first, peak, max(warmup, 1))
    if config.schedule == "constant":
        return optax.join_schedules([rise, optax.constant_schedule(peak)], [warmup])
    if config.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=first,
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
                rise,
                optax.constant_schedule(peak),
                optax.linear_schedule(
                    peak, peak * config.final_fraction, max(num_steps - decay_step, 1)
                ),
            ],
            [warmup, decay_step],
        )
    if config.schedule == "inverse_sqrt":
        # Vaswani et al., arXiv:1706.03762, equation 3, scaled to the peak; its steps count from 1.
        return lambda step: peak * jnp.minimum((step + 1) / warmup, jnp.sqrt(warmup / (step + 1)))
    if config.schedule == "triangle":
        return _make_one_cycle(config, num_steps, first, peak, 0.0)
    # The division by 25 at the start and by 25e4 at the end are the defaults of the one-cycle
    # policy that SPION and SAT train with.
    return _make_one_cycle(config, num_steps, peak / 25, peak, peak / 25e4)


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
    else:
        rate = optimizer.schedule(_count_steps(optimizer, phase, step, phase_start_step))
    return jnp.asarray(rate * phase.learning_rate_scale, jnp.float32)


def compute_b1(
    optimizer: Optimizer, phase: Phase, step: jax.Array, phase_start_step: jax.Array
) -> jax.typing.ArrayLike:
    """Return the decay of the first moment of one step, as its phase wants it.

    Args:
      phase: Phase, static.
      step: i32[], steps done before this one.
      phase_start_step: i32[], steps done when the phase began.

    Returns:
      float where it is the same in all steps of the phase, else f32[].
    """
    if phase.learning_rate == "constant":
        return optimizer.base_b1
    return optimizer.b1_schedule(_count_steps(optimizer, phase, step, phase_start_step))


def _count_steps(optimizer, phase, step, phase_start_step):
    """Return which step of the schedule this one is."""
    late = jnp.maximum(step - 1, 0) if optimizer.late_schedule else step
    if phase.learning_rate != "restart":
        return late
    begun = step - phase_start_step
    return jnp.where(begun == 0, late, begun) if optimizer.late_schedule else begun
