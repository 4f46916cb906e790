"""What a configured run needs on GPUs, found by compiling its programs on a machine without one.

Memory is XLA's own account of each program, registers and spills are those of ptxas; what devices
exchange is read from the program. Nothing is computed and no data is opened.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax

from pallas_kernels import aot
from sparsejax.accounting.collectives import Collective, find_collectives
from sparsejax.config.parse import ConfigError, naming_data
from sparsejax.config.schema import TrainConfig, make_recipe, make_transformer_config
from sparsejax.data import DataSpec, describe_data
from sparsejax.models import Choice, assume_proven, record_choices
from sparsejax.optimizer import make_optimizer
from sparsejax.recipes import Phase
from sparsejax.report.progress import say
from sparsejax.sharding import list_whole_leaves
from sparsejax.tools.programs import EVALUATION, PROBE, TRAIN, make_abstract_batch, make_steps
from sparsejax.training.block_lists import make_block_lists
from sparsejax.training.devices import check_run_parts, place_arguments, place_results
from sparsejax.training.state import make_abstract_state
from sparsejax.types import PyTree

MEMORY_FRACTION = 0.75
"""What JAX takes of a GPU's memory when it starts, if XLA_PYTHON_CLIENT_MEM_FRACTION is not set."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """What one phase needs; bytes are those of one device.

    Attributes:
      name: str, the phase.
      parts: dict, what the train step's memory consists of -> bytes.
      programs: dict "train step", "evaluation step" and, in a phase that probes, "probing train
        step" ->
        AotReport.
      choices: what each sparse op runs on.
      largest_batch_size: int, examples with which a train step still fits, estimated; None if
        memory was not seen to grow with the batch.
      collectives: of the train step; none on one device.
      whole_leaves: large leaves of the state that no device holds a part of -> bytes.
    """

    name: str
    parts: Mapping[str, int]
    programs: Mapping[str, aot.AotReport]
    choices: tuple[Choice, ...]
    largest_batch_size: int | None
    collectives: tuple[Collective, ...] = ()
    whole_leaves: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """The most that any program of the phase needs beside the whole state and a batch."""
        reports = self.programs.values()
        train = self.programs[TRAIN]
        extra = max(r.temp_bytes + r.output_bytes - r.alias_bytes for r in reports)
        return train.argument_bytes + extra


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs on one GPU, or on each of several.

    Attributes:
      spec: DataSpec of the data set.
      phases: tuple of PhasePlan, in the order of training.
      hosts: int, machines that the devices are in, as many in each.
    """

    config: TrainConfig
    spec: DataSpec
    target: aot.GpuTarget
    phases: tuple[PhasePlan, ...]
    hosts: int = 1

    @property
    def num_devices(self) -> int:
        """Parts of the mesh."""
        return math.prod(self.config.mesh.sizes.values())

    @property
    def num_copies(self) -> int:
        """Parts that the examples of a batch are dealt out to."""
        return self.config.mesh.sizes["data"] * self.config.mesh.sizes["fsdp"]

    @property
    def device_name(self) -> str:
        """How many of which GPU."""
        on_hosts = f" on {self.hosts} hosts" if self.hosts > 1 else ""
        count = "one" if self.num_devices == 1 else self.num_devices
        return f"{count} {self.target.name}{on_hosts}"

    @property
    def usable_bytes(self) -> int:
        """What JAX takes of the GPU's memory by default."""
        return int(self.target.memory_bytes * MEMORY_FRACTION)


def make_plan(config: TrainConfig, *, target: str = "h200", hosts: int = 1) -> Plan:
    """Compile the programs of every phase, and the train step with two batch sizes.

    There are as many devices as the configured mesh has parts, one along mesh.data if that is -1.

    Peak memory is taken to be a straight line over the batch size, through the peaks of steps
    compiled with the configured batch and with twice as much; the largest batch is where the line
    meets what JAX takes of the GPU's memory, rounded down so that parts stay equal.

    Args:
      target: str, one of `aot.TARGETS`.
      hosts: int, machines that the devices are in, as many in each.

    Raises:
      ConfigError: if the target is unknown, the data cannot be described or does not fit the
        settings, the mesh cuts the batch or the model into unequal parts, the hosts would have
        unequal numbers of devices, the named kernel does not run on the target, or the packages of
        the `compile` extra are missing.
    """
    if target not in aot.TARGETS:
        raise ConfigError(f"--target must be one of {list(aot.TARGETS)}, got {target!r}")
    gpu = aot.TARGETS[target]
    with naming_data():
        spec = describe_data(config.data)
    plan = Plan(config=config, spec=spec, target=gpu, phases=(), hosts=hosts)
    if hosts < 1 or plan.num_devices % hosts:
        raise ConfigError(
            "--hosts must divide the number of devices of the mesh, "
            f"{plan.num_devices}, got {hosts}"
        )
    model = _make_model(config, spec)
    check_run_parts(config, model, config.mesh.sizes)
    try:
        mesh = aot.make_gpu_mesh(gpu, axes=config.mesh.sizes, hosts=hosts)
    except RuntimeError as error:
        raise ConfigError(f"{error}; or run `make plan CONFIG=...`, which has them") from error
    phases = make_recipe(config, model).phases
    count = sum(3 + bool(phase.probe_every_steps) for phase in phases)
    say(f"compiling {count} programs for {plan.device_name}")
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
    """Compile the programs of one phase for a GPU, or for each of several.

    Args:
      spec: DataSpec of the data set.
      phase: Phase of the configured recipe.
      mesh: from `aot.make_gpu_mesh`; of several devices, with the axes of a run's mesh.
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
    arguments = steps.arguments

    def place(name):
        if mesh.size == 1:
            return {}
        if name == EVALUATION:
            return {"out_shardings": jax.sharding.NamedSharding(mesh, jax.P())}
        return {"out_shardings": place_results(arguments[0], mesh, probes=name == PROBE)}

    if mesh.size > 1:
        arguments = place_arguments(*arguments, mesh)
    return {
        name: aot.compile_for(
            step,
            *arguments,
            mesh=mesh,
            donate_argnums=() if name == EVALUATION else 0,
            **place(name),
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
    state = _make_state(config, spec, phase)
    collectives, whole = [], {}
    if mesh.size > 1:
        collectives = find_collectives(train.hlo, config.mesh.sizes, hosts=plan.hosts)
        whole = list_whole_leaves(state, mesh)
    return PhasePlan(
        name=phase.name,
        parts=_measure_parts(plan, phase, state, train, mesh),
        programs=programs,
        choices=tuple(choices),
        largest_batch_size=estimate_largest_batch(
            (train.peak_bytes, twice.peak_bytes),
            batch_size=size,
            usable_bytes=plan.usable_bytes,
            multiple_of=config.num_micro_batches * plan.num_copies,
        ),
        collectives=tuple(collectives),
        whole_leaves=whole,
    )


def _make_state(config, spec, phase):
    model = _make_model(config, spec)
    optimizer = make_optimizer(config.optimizer, num_steps=config.schedule_length)
    return make_abstract_state(model, make_recipe(config, model), optimizer, phase.name)


def _measure_parts(plan: Plan, phase: Phase, state, train: aot.AotReport, mesh) -> dict[str, int]:
    lists = jax.eval_shape(functools.partial(make_block_lists, phase=phase), state.sparsity.masks)
    batch = make_abstract_batch(plan.config, plan.spec)
    if mesh.size > 1:
        state, batch, lists = place_arguments(state, batch, lists, mesh)
    sparsity = state.sparsity
    counters = (state.step, state.num_skipped, state.key, sparsity.phase_start_step)
    return {
        "parameters": _count_bytes((state.params, sparsity.params)),
        "optimizer state": _count_bytes(state.opt_state),
        "masks, statistics, counters": _count_bytes(
            (sparsity.masks, sparsity.statistics, counters)
        ),
        "lists of attention blocks": _count_bytes(lists),
        "batch": _count_bytes(batch),
        "temporaries (activations, gradients)": train.temp_bytes,
        "metrics": train.output_bytes - train.alias_bytes,
    }


def _count_bytes(tree: PyTree) -> int:
    """Count the bytes that one device holds."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )
