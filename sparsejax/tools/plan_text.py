"""A plan as text: a column for each phase, and what devices exchange."""

from collections.abc import Sequence

from sparsejax.accounting.collectives import (
    Collective,
    Traffic,
    group_collectives,
    sum_traffic,
)
from sparsejax.tools.plan import MEMORY_FRACTION, PhasePlan, Plan
from sparsejax.tools.programs import TRAIN, make_abstract_batch

# Of what a device sends, what has a row of its own.
_SMALL = 1e-3


def format_plan(plan: Plan) -> str:
    """Lay a plan out as text, a column for each phase; of several devices, say what they send.

    Returns:
      str of several lines.
    """
    phases, config = plan.phases, plan.config
    names = dict.fromkeys(name for phase in phases for name in phase.programs)

    def temporaries(name):
        reports = [phase.programs.get(name) for phase in phases]
        return [_megabytes(report and report.temp_bytes) for report in reports]

    several = plan.num_devices > 1
    title = "memory of each device, MB" if several else "memory, MB"
    rows = [(title, [phase.name for phase in phases])]
    rows += [
        (f"  {part}", [_megabytes(phase.parts[part]) for phase in phases])
        for part in phases[0].parts
    ]
    totals = [_megabytes(sum(phase.parts.values())) for phase in phases]
    rows.append(("  train step, together", totals))
    rows += [(f"  temporaries of the {n}", temporaries(n)) for n in names if n != TRAIN]
    rows.append(("  the most that any step needs", [_megabytes(p.peak_bytes) for p in phases]))
    rows += [("", []), ("what fits", [])]
    rows.append(("  GPU memory that JAX takes, MB", [_megabytes(plan.usable_bytes)] * len(phases)))
    headroom = [_megabytes(plan.usable_bytes - phase.peak_bytes) for phase in phases]
    rows.append(("  headroom, MB", headroom))
    largest = [phase.largest_batch_size for phase in phases]
    rows.append(("  largest batch, examples", ["–" if n is None else f"{n:,}" for n in largest]))
    if several:
        shares = ["–" if n is None else f"{n // plan.num_copies:,}" for n in largest]
        rows.append(("  of these on each device", shares))
    size = config.data.batch_size
    shape = " x ".join(map(str, make_abstract_batch(config, plan.spec)["inputs"].shape))
    unit = "bytes" if plan.spec.patch_values else "tokens"
    return "\n".join(
        [
            f"recipe {config.recipe.name} on {plan.device_name}, batch of {shape} {unit}, "
            f"num_micro_batches={config.num_micro_batches}",
            *_format_mesh(plan),
            "",
            _align(rows),
            "",
            f"JAX takes {MEMORY_FRACTION:.0%} of the GPU's "
            f"{_megabytes(plan.target.memory_bytes)} MB unless XLA_PYTHON_CLIENT_MEM_FRACTION is "
            "set. The largest",
            f"batch is an estimate: train steps compiled with {size} and {2 * size} examples, and "
            "a straight line.",
            "",
            *_format_exchange(plan),
            _format_choices(plan),
            "",
            _format_kernels(phases),
        ]
    )


def _format_mesh(plan: Plan) -> list[str]:
    if plan.num_devices == 1:
        return []
    sizes = " x ".join(f"{name}={size}" for name, size in plan.config.mesh.sizes.items())
    lines = [f"mesh of {sizes}"]
    whole = {path: size for phase in plan.phases for path, size in phase.whole_leaves.items()}
    lines += [f"note: not cut is {path}, {_megabytes(size)} MB" for path, size in whole.items()]
    return lines


def _format_exchange(plan: Plan) -> list[str]:
    """Lay out what devices send in a train step, by kind and axis; nothing of one device."""
    if plan.num_devices == 1:
        return []
    crosses = plan.hosts > 1
    head = ["times a step", "MB", *["MB to other hosts"] * crosses, "times a micro-batch", "MB"]
    rows = [("each device sends", head)]
    for phase in plan.phases:
        for name, group in _group_by_name(phase).items():
            step, part = sum_traffic(group), _sum_of_part(group, plan.config.num_micro_batches)
            cells = [f"{step.count:,}", _megabytes(step.sent_bytes)]
            cells += [_megabytes(step.crossing_bytes)] * crosses
            cells += [f"{part.count:,}", _megabytes(part.sent_bytes)]
            rows.append((f"  {phase.name}, {name}", cells))
    return [
        _align(rows),
        "",
        "Weights are gathered again for each micro-batch, and their gradients are added up after "
        "each: fewer",
        "micro-batches send less and need more memory. Bytes are those of rings, as NCCL's are.",
        "",
    ]


def _group_by_name(phase: PhasePlan) -> dict[str, list[Collective]]:
    """Return what a table has a row for, with what is too small for one under "the rest"."""
    least = sum_traffic(phase.collectives).sent_bytes * _SMALL
    groups: dict[str, list[Collective]] = {}
    for (kind, axes), group in group_collectives(phase.collectives).items():
        is_small = sum_traffic(group).sent_bytes < least
        name = "the rest" if is_small else f"{kind} over {' x '.join(axes)}"
        groups.setdefault(name, []).extend(group)
    return groups | {"together": [*phase.collectives]}


def _sum_of_part(group: Sequence[Collective], num_parts: int) -> Traffic:
    """Add up what is sent for one micro-batch: what goes round in the outermost loop, if any."""
    if num_parts == 1:
        return sum_traffic(group)
    return sum_traffic([each for each in group if each.trips[:1] == (num_parts,)], loops=1)


def _format_choices(plan: Plan) -> str:
    choices = {c.call: c for phase in plan.phases for c in phase.choices}
    if not choices:
        return "no sparse ops"
    lines = [f"  {choice.backend} for {call}" for call, choice in choices.items()]
    if any(not choice.is_named for choice in choices.values()):
        lines.append(
            f"Backends that no setting names are those that run on one {plan.target.name} if the "
            "doctor finds them right and faster there."
        )
    return "\n".join(["backends of the sparse ops", *lines])


def _format_kernels(phases: Sequence[PhasePlan]) -> str:
    head = ["registers", "spill bytes", "shared memory, bytes"]
    rows = [
        (
            f"  {phase.name}, {program}, {kernel.name}",
            [
                f"{count:,}"
                for count in (kernel.registers, kernel.spill_bytes, kernel.shared_memory_bytes)
            ],
        )
        for phase in phases
        for program, report in phase.programs.items()
        for kernel in report.kernels
    ]
    if not rows:
        return "no Mosaic or Triton kernels"
    return _align([("Mosaic and Triton kernels", head), *rows])


def _align(rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    left = max(len(label) for label, _ in rows)
    cells = [cell for _, row in rows for cell in row]
    right = max(len(cell) for cell in cells)
    lines = (
        f"{label:<{left}}" + "".join(f"  {cell:>{right}}" for cell in row) for label, row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _megabytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.1f}"
