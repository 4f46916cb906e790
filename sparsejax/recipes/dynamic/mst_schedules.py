"""The schedules of mixed sparsity training: warm-up, ultra-sparse phase, restoration."""

from typing import NamedTuple

from sparsejax.masks.weights.schedules import (
    AnnealingPhase,
    CosineAnnealing,
    Ramp,
    SparsitySchedule,
    UpdateSteps,
)
from sparsejax.recipes.dynamic.settings import make_updates
from sparsejax.shares import count_share


class MSTSchedules(NamedTuple):
    """What `mst_schedules` returns.

    Attributes:
      sparsity: with a ramp for the warm-up and one for the restoration.
      annealing: with a phase for warm-up, ultra-sparse training and restoration.
      updates: to the end of the run.
      sparse_attention: (start, end), steps of the ultra-sparse phase and of hybrid attention.
    """

    sparsity: SparsitySchedule
    annealing: CosineAnnealing
    updates: UpdateSteps
    sparse_attention: tuple[int, int]


def mst_schedules(
    num_steps: int,
    *,
    sparsity: float = 0.9,
    final_sparsity: float = 0.0,
    warmup: float = 0.1,
    restoration: float = 0.13,
    stairs: int | None = 10,
    update_fraction: float = 0.3,
    update_interval_fraction: float = 0.01,
) -> MSTSchedules:
    """Return the schedules of mixed sparsity training: warm-up, ultra-sparse phase, restoration.

    The sparsity climbs from 0 in stairs, holds, and falls linearly. Neither the paper nor its
    released code states the numbers, so most defaults are ours: with hybrid attention of stride
    128, GPT-2 small trains at 23.6 % of the dense FLOPs, head included and all pairs of positions
    counted; a run counts the visible half and updates too, 22.5 %. `update_fraction` is the
    released script's, which updates every 100 of 600,000 steps.

    The restoration ends at the last update and not at the end of the run, so that the last masks
    have `final_sparsity`.

    Args:
      num_steps: steps of the run.
      sparsity: fraction removed in the ultra-sparse phase, in [0, 1).
      final_sparsity: fraction removed at the end, in [0, 1); 0 = a dense model.
      warmup: fraction of the run for the warm-up.
      restoration: fraction of the run for the restoration, which takes two steps at least.
      stairs: jumps of the warm-up, not more than its steps; None climbs linearly.
      update_fraction: zeta in [0, 1] at the start of each phase.
      update_interval_fraction: dT, share of the run from one update to the next, in (0, 1).

    Raises:
      ValueError: if a setting is out of range, or the run is too short for the phases.

    References:
      Hu, Li, Huang, MST, arXiv:2408.11746.

    Example:
      >>> mst = mst_schedules(1000, update_interval_fraction=0.01)
      >>> [f"{mst.sparsity.density(step):.2f}" for step in (0, 10, 100, 870, 990)]
      ['1.00', '0.91', '0.10', '0.10', '1.00']
      >>> mst.sparse_attention
      (100, 870)
    """
    if not (warmup > 0 and restoration > 0 and warmup + restoration < 1):
        raise ValueError(
            "warmup and restoration must be positive and leave an ultra-sparse phase between, got "
            f"warmup={warmup}, restoration={restoration}"
        )
    full_step = count_share(warmup, num_steps)
    restore_step = num_steps - max(2, count_share(restoration, num_steps))
    if restore_step <= full_step:
        raise ValueError(
            f"warmup={warmup} and restoration={restoration} must leave an ultra-sparse phase in "
            f"{num_steps} steps, got {full_step} step of warm-up and {num_steps - restore_step} of "
            "restoration"
        )
    updates = make_updates(update_interval_fraction, num_steps)
    if updates.last_step <= restore_step:
        raise ValueError(
            f"restoration={restoration} must reach an update after its first step, got "
            f"{num_steps - restore_step} steps of restoration with an update every "
            f"{updates.interval} steps (update_interval_fraction={update_interval_fraction})"
        )
    warmup_ramp = Ramp(
        start_step=0,
        end_step=full_step,
        sparsity=sparsity,
        stairs=None if stairs is None else min(stairs, full_step),
    )
    restoration_ramp = Ramp(
        start_step=restore_step, end_step=updates.last_step, sparsity=final_sparsity
    )
    ends = (0, full_step, restore_step, num_steps)
    phases = tuple(
        AnnealingPhase(start_step=start, end_step=end, fraction=update_fraction)
        for start, end in zip(ends[:-1], ends[1:], strict=True)
    )
    return MSTSchedules(
        sparsity=SparsitySchedule(num_steps=num_steps, ramps=(warmup_ramp, restoration_ramp)),
        annealing=CosineAnnealing(num_steps=num_steps, phases=phases),
        updates=updates,
        sparse_attention=(full_step, restore_step),
    )
