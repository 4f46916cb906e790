"""What a configured run needs on a GPU, found by compiling its programs on a machine without one.

Memory is XLA's own account of each program, registers and spills are those of ptxas; nothing is
computed and no data is opened.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax

from pallas_kernels import aot
from sparsejax.config.parse import ConfigError, naming_data
from sparsejax.config.schema import TrainConfig, make_recipe, make_transformer_config
from sparsejax.data import DataSpec, describe_data
from sparsejax.models import Choice, assume_proven, record_choices
from sparsejax.optimizer import make_optimizer
from sparsejax.recipes import Phase
from sparsejax.report.progress import say
from sparsejax.tools.programs import EVALUATION, PROBE, TRAIN, make_abstract_batch, make_steps
from sparsejax.training.block_lists import make_block_lists
from sparsejax.training.state import make_abstract_state
from sparsejax.types import PyTree

# What JAX takes of a GPU's memory when it starts, if XLA_PYTHON_CLIENT_MEM_FRACTION is not set.
_MEMORY_FRACTION = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """What one phase needs.

    Attributes:
      name: str, the phase.
      parts: dict, what the train step's memory consists of -> bytes.
      programs: dict "train step", "evaluation step" and, in a phase that probes, "probing train
        step" ->
        AotReport.
      choices: what each sparse op runs on.
      largest_batch_size: int, examples with which a train step still fits, estimated; None if
        memory was not seen to grow with the batch.
    """

    name: str
    parts: Mapping[str, int]
    programs: Mapping[str, aot.AotReport]
    choices: tuple[Choice, ...]
    largest_batch_size: int | None

    @property
    def peak_bytes(self) -> int:
        """The most that any program of the phase needs beside the whole state and a batch."""
        reports = self.programs.values()
        train = self.programs[TRAIN]
        extra = max(r.temp_bytes + r.output_bytes - r.alias_bytes for r in reports)
        return train.argument_bytes + extra


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs on one GPU.

    Attributes:
      spec: DataSpec of the data set.
      phases: tuple of PhasePlan, in the order of training.
    """

    config: TrainConfig
    spec: DataSpec
    target: aot.GpuTarget
    phases: tuple[PhasePlan, ...]

    @property
    def usable_bytes(self) -> int:
        """What JAX takes of the GPU's memory by default."""
        return int(self.target.memory_bytes * _MEMORY_FRACTION)


def make_plan(config: TrainConfig, *, target: str = "h200") -> Plan:
    """Compile the programs of every phase, and the train step with two batch sizes.

    Peak memory is taken to be a straight line over the batch size, through the peaks of steps
    compiled with the configured batch and with twice as much; the largest batch is where the line
    meets what JAX takes of the GPU's memory, rounded down to a multiple of the micro-batches.

    Args:
      target: str, one of `aot.TARGETS`.

    Raises:
      ConfigError: if the target is unknown, the data cannot be described or does not fit the
        settings, the named kernel does not run on the target, or the packages of the `compile`
        extra are missing.
    """
    if target not in aot.TARGETS:
        raise ConfigError(f"--target must be one of {list(aot.TARGETS)}, got {target!r}")
    gpu = aot.TARGETS[target]
    with naming_data():
        spec = describe_data(config.data)
    try:
        mesh = aot.make_gpu_mesh(gpu)
    except RuntimeError as error:
        raise ConfigError(f"{error}; or run `make plan CONFIG=...`, which has them") from error
    phases = make_recipe(config, _make_model(config, spec)).phases
    count = sum(3 + bool(phase.probe_every_steps) for phase in phases)
    say(f"compiling {count} programs for one {gpu.name}")
    plan = Plan(config=config, spec=spec, target=gpu, phases=())
    planned = tuple(_plan_phase(plan, phase, mesh) for phase in phases)
    return dataclasses.replace(plan, phases=planned)


def compile_programs(
    config: TrainConfig,
    spec: DataSpec,
    phase: Phase,
    *,
    mesh: jax.sharding.Mesh,
    names: Sequence[str] = (TRAIN, EVALUATION, PROBE),
) -> dict[str, aot.AotReport]:
    """Compile the programs of one phase for a GPU.

    Args:
      spec: DataSpec of the data set.
      phase: Phase of the configured recipe.
      mesh: from `aot.make_gpu_mesh`.
      names: of "train step", "evaluation step" and "probing train step"; the last is left out in
        a phase that does not probe.

    Returns:
      dict name -> AotReport.

    Raises:
      NotImplementedError: if the configured kernel does not run on the GPU.
    """
    # Shapes of masks come of a search for them, whose backend is the GPU's too.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        steps = make_steps(config, spec, phase)
    return {
        name: aot.compile_for(
            step, *steps.arguments, mesh=mesh, donate_argnums=() if name == EVALUATION else 0
        )
        for name, step in steps.functions.items()
        if name in names
    }


def estimate_largest_batch(
    peaks: tuple[int, int], *, batch_size: int, usable_bytes: int, multiple_of: int
) -> int | None:
    """Follow the straight line through two peaks to where the memory ends.

    Args:
      peaks: bytes that a step needs with a batch of `batch_size` and with twice as much.
      batch_size: int, examples.
      usable_bytes: int, memory to stay within.
      multiple_of: int, the result is rounded down to a multiple of this.

    Returns:
      int, examples; 0 if none fits, None if the peaks do not grow with the batch.

    Example:
      >>> estimate_largest_batch((300, 500), batch_size=4, usable_bytes=1000, multiple_of=4)
      16
    """
    bytes_per_batch = peaks[1] - peaks[0]
    if bytes_per_batch <= 0:
        return None
    fixed_bytes = peaks[0] - bytes_per_batch
    examples = (usable_bytes - fixed_bytes) * batch_size // bytes_per_batch
    return max(0, examples // multiple_of * multiple_of)


def format_plan(plan: Plan) -> str:
    """Lay a plan out as text, a column for each phase.

    Returns:
      str of several lines.
    """
    phases, config = plan.phases, plan.config
    names = dict.fromkeys(name for phase in phases for name in phase.programs)

    def temporaries(name):
        reports = [phase.programs.get(name) for phase in phases]
        return [_megabytes(report and report.temp_bytes) for report in reports]

    rows = [("memory, MB", [phase.name for phase in phases])]
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
    size = config.data.batch_size
    shape = " x ".join(map(str, make_abstract_batch(config, plan.spec)["inputs"].shape))
    unit = "bytes" if plan.spec.patch_values else "tokens"
    return "\n".join(
        [
            f"recipe {config.recipe.name} on one {plan.target.name}, batch of {shape} {unit}, "
            f"num_micro_batches={config.num_micro_batches}",
            "",
            _align(rows),
            "",
            f"JAX takes {_MEMORY_FRACTION:.0%} of the GPU's "
            f"{_megabytes(plan.target.memory_bytes)} MB unless XLA_PYTHON_CLIENT_MEM_FRACTION is "
            "set. The largest",
            f"batch is an estimate: train steps compiled with {size} and {2 * size} examples, and "
            "a straight line.",
            "",
            _format_choices(plan),
            "",
            _format_kernels(phases),
        ]
    )


def _make_model(config: TrainConfig, spec: DataSpec):
    return make_transformer_config(config, **spec._asdict())


def _plan_phase(plan: Plan, phase: Phase, mesh: jax.sharding.Mesh) -> PhasePlan:
    config, spec = plan.config, plan.spec
    size = config.data.batch_size
    doubled = dataclasses.replace(
        config, data=dataclasses.replace(config.data, batch_size=2 * size)
    )
    try:
        # Nothing has run there: what a right verdict would choose.
        with assume_proven(), record_choices() as choices:
            programs = compile_programs(config, spec, phase, mesh=mesh)
        train = programs[TRAIN]
        with assume_proven():
            twice = compile_programs(doubled, spec, phase, mesh=mesh, names=[TRAIN])[TRAIN]
    except NotImplementedError as error:
        named = config.named_implementations
        raise ConfigError(f"{named} must run on one {plan.target.name}: {error}") from error
    return PhasePlan(
        name=phase.name,
        parts=_measure_parts(config, spec, phase, train),
        programs=programs,
        choices=tuple(choices),
        largest_batch_size=estimate_largest_batch(
            (train.peak_bytes, twice.peak_bytes),
            batch_size=size,
            usable_bytes=plan.usable_bytes,
            multiple_of=config.num_micro_batches,
        ),
    )


def _measure_parts(config, spec, phase, train: aot.AotReport) -> dict[str, int]:
    model = _make_model(config, spec)
    optimizer = make_optimizer(config.optimizer, num_steps=config.schedule_length)
    state = make_abstract_state(model, make_recipe(config, model), optimizer, phase.name)
    sparsity = state.sparsity
    counters = (state.step, state.num_skipped, state.key, sparsity.phase_start_step)
    lists = jax.eval_shape(functools.partial(make_block_lists, phase=phase), sparsity.masks)
    return {
        "parameters": _count_bytes((state.params, sparsity.params)),
        "optimizer state": _count_bytes(state.opt_state),
        "masks, statistics, counters": _count_bytes(
            (sparsity.masks, sparsity.statistics, counters)
        ),
        "lists of attention blocks": _count_bytes(lists),
        "batch": _count_bytes(make_abstract_batch(config, spec)),
        "temporaries (activations, gradients)": train.temp_bytes,
        "metrics": train.output_bytes - train.alias_bytes,
    }


def _count_bytes(tree: PyTree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


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


def _megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.1f}"
