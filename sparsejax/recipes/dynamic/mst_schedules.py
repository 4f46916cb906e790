"""The schedules of mixed sparsity training: warm-up, ultra-sparse phase, restoration."""

from typing import NamedTuple

from sparsejax.masks.weights.schedules import (
    AnnealingPhase,
    CosineAnnealing,
    Ramp,
    SparsitySchedule,
    UpdateSteps,
)


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
    update_interval: int = 100,
) -> MSTSchedules:
    """Return the schedules of mixed sparsity training: warm-up, ultra-sparse phase, restoration.

    The sparsity climbs from 0 in stairs, holds, and falls linearly. Neither the paper nor its
    released code states the numbers, so most defaults are ours: with hybrid attention of stride
    128, GPT-2 small trains at 23.6 % of the dense FLOPs, head included. `update_fraction` and
    `update_interval` are the released script's.

    The restoration ends at the last update and not at the end of the run, so that the last masks
    have `final_sparsity`.

    Args:
      num_steps: steps of the run.
      sparsity: fraction removed in the ultra-sparse phase, in [0, 1).
      final_sparsity: fraction removed at the end, in [0, 1); 0 = a dense model.
      warmup: fraction of the run for the warm-up.
      restoration: fraction of the run for the restoration.
      stairs: jumps of the warm-up; None climbs linearly.
      update_fraction: zeta in [0, 1] at the start of each phase.
      update_interval: dT, steps from one update to the next.

    Raises:
      ValueError: if a setting is out of range, or the run is too short for the phases.

    References:
      Hu, Li, Huang, MST, arXiv:2408.11746.

    Example:
      >>> mst = mst_schedules(1000, update_interval=10)
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
    full_step, restore_step = round(warmup * num_steps), num_steps - round(restoration * num_steps)
    updates = UpdateSteps(interval=update_interval, end_step=num_steps)
    warmup_ramp = Ramp(start_step=0, end_step=full_step, sparsity=sparsity, stairs=stairs)
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
