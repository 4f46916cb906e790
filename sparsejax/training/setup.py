"""What is fixed during a run, and the programs compiled for one of its phases."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparsejax.config.parse import ConfigError
from sparsejax.config.schema import (
    TrainConfig,
    make_recipe,
    make_transformer_config,
    name_kernels,
    step_options,
)
from sparsejax.data import Data, make_data
from sparsejax.models import TransformerConfig
from sparsejax.optimizer import Optimizer, make_optimizer
from sparsejax.recipes import Phase, Recipe
from sparsejax.training.state import (
    TrainState,
    create_train_state,
    enter_phase,
    make_abstract_state,
    make_graphdef,
)
from sparsejax.training.step import Batch, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The static parts of a run, built once from its settings.

    Attributes:
      config: TrainConfig.
      data: Data.
      model: TransformerConfig, completed by the data.
      graphdef: nnx.GraphDef of the model.
      recipe: Recipe.
      optimizer: Optimizer.
      replicated: sharding of the state, a copy on every device.
      split: sharding of a batch, its examples dealt out over the devices.
    """

    config: TrainConfig
    data: Data
    model: TransformerConfig
    graphdef: nnx.GraphDef
    recipe: Recipe
    optimizer: Optimizer
    replicated: NamedSharding
    split: NamedSharding

    def create_state(self) -> TrainState:
        """Initialise the state at step 0 on the devices.

        Returns:
          TrainState.
        """
        create = functools.partial(create_train_state, self.model, self.recipe, self.optimizer)
        key = jax.random.key(self.config.seed)
        return jax.jit(create, out_shardings=self.replicated)(key)

    def enter_phase(self, state: TrainState, phase: Phase) -> TrainState:
        """Hand the state over to a later phase.

        Args:
          state: TrainState, not to be used again.
          phase: Phase.

        Returns:
          TrainState of the new phase.
        """

        def enter(state):
            return enter_phase(state, self.recipe, phase, self.optimizer)

        return jax.jit(enter, out_shardings=self.replicated)(state)

    def make_abstract_state(self, phase_name: str) -> TrainState:
        """Return shapes, types and shardings of the state in a phase.

        Args:
          phase_name: str.

        Returns:
          TrainState of `jax.ShapeDtypeStruct`.
        """
        abstract = make_abstract_state(self.model, self.recipe, self.optimizer, phase_name)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.replicated), abstract
        )

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """Copy this process's part of a batch to the devices.

        Args:
          batch: dict of arrays with the examples in front.

        Returns:
          dict of global arrays.
        """
        return jax.tree.map(
            functools.partial(jax.make_array_from_process_local_data, self.split), batch
        )


def prepare_run(config: TrainConfig) -> Run:
    """Open the data and build everything that does not change during training.

    Args:
      config: TrainConfig.

    Returns:
      Run.

    Raises:
      ConfigError: if the data cannot be used as configured, or a setting does not fit it.
    """
    try:
        data = make_data(
            config.data, process_index=jax.process_index(), process_count=jax.process_count()
        )
    except ValueError as error:
        # The data layer names its own fields.
        raise ConfigError(f"data.{error}") from error
    except OSError as error:
        raise ConfigError(f"data.source={config.data.source!r}: {error}") from error
    model = make_transformer_config(config, **data.spec._asdict())
    devices = _choose_devices(config)
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    run = Run(
        config=config,
        data=data,
        model=model,
        graphdef=make_graphdef(model),
        recipe=make_recipe(config, model),
        optimizer=make_optimizer(config.optimizer, num_steps=config.num_steps),
        replicated=NamedSharding(mesh, PartitionSpec()),
        split=NamedSharding(mesh, PartitionSpec("data")),
    )
    _check_implementation(run)
    return run


def _choose_devices(config: TrainConfig) -> list[Any]:
    """Take as many devices as can share a micro-batch evenly."""
    examples = config.data.batch_size // config.num_micro_batches
    devices = jax.devices()
    if jax.process_count() == 1:
        return devices[: max(n for n in range(1, len(devices) + 1) if examples % n == 0)]
    if examples % len(devices):
        raise ConfigError(
            f"data.batch_size / num_micro_batches must be a multiple of the {len(devices)} devices "
            f"of all processes, got {config.data.batch_size} / {config.num_micro_batches}"
        )
    return devices


def _check_implementation(run: Run) -> None:
    """Trace every phase, so that a kernel that is not there is missed now and not at the switch."""
    named = name_kernels(run.config)
    if not named:
        return
    batch = next(run.data.validation(1))
    options: dict[str, Any] = {**step_options(run.config), "num_micro_batches": 1}
    for phase in run.recipe.phases:
        step = make_eval_step(run.graphdef, run.recipe, phase, **options)
        try:
            jax.eval_shape(step, run.make_abstract_state(phase.name), batch)
        except NotImplementedError as error:
            raise ConfigError(f"{named} must run on this device: {error}") from error


class Programs(NamedTuple):
    """The compiled programs of one phase; they cannot recompile, only refuse other shapes.

    Attributes:
      train_step: (state, batch) -> (state, metrics); the state is donated.
      eval_step: (state, batch) -> totals.
      probing_step: (state, batch) -> (state, metrics, Observation), for the steps that probe; None
        in a phase without.
      step_memory_bytes: int, arguments, results and temporaries of a train step on one device.
      compile_seconds: float.
    """

    train_step: Callable
    eval_step: Callable
    probing_step: Callable | None
    step_memory_bytes: int
    compile_seconds: float


def compile_evaluation(run: Run, phase: Phase, batch: Batch) -> Callable:
    """Compile a phase's evaluation alone.

    Args:
      run: Run.
      phase: Phase.
      batch: a batch of the shapes to come.

    Returns:
      Function (state, batch) -> totals.
    """
    step = make_eval_step(run.graphdef, run.recipe, phase, **step_options(run.config))
    jitted = jax.jit(step, out_shardings=run.replicated)
    return jitted.lower(run.make_abstract_state(phase.name), batch).compile()


def compile_phase(run: Run, phase: Phase, batch: Batch) -> Programs:
    """Compile a phase's programs ahead of its first step.

    Args:
      run: Run.
      phase: Phase.
      batch: a batch of the shapes to come.

    Returns:
      Programs.
    """
    start = time.perf_counter()
    state = run.make_abstract_state(phase.name)
    build = {**step_options(run.config), "label_smoothing": run.config.label_smoothing}

    def compile_step(step):
        # Whatever a step returns stays replicated, so that it fits the next step's program.
        jitted = jax.jit(step, donate_argnums=0, out_shardings=run.replicated)
        return jitted.lower(state, batch).compile()

    def compile_train_step(**options):
        step = make_train_step(run.graphdef, run.recipe, phase, run.optimizer, **build, **options)
        return compile_step(step)

    train_step = compile_train_step()
    probing_step = compile_train_step(probes=True) if phase.probe_every_steps else None
    memory = train_step.memory_analysis()
    assert memory is not None, "XLA reports the memory of what it compiled"
    return Programs(
        train_step=train_step,
        eval_step=compile_evaluation(run, phase, batch),
        probing_step=probing_step,
        step_memory_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        compile_seconds=time.perf_counter() - start,
    )


def compute_validation(run: Run, eval_step: Callable, state: TrainState) -> dict[str, float]:
    """Average loss and accuracy over the configured number of validation batches.

    Args:
      run: Run.
      eval_step: compiled for the state's phase.
      state: TrainState.

    Returns:
      dict with "validation_loss" in nats per token or example and "validation_accuracy".
    """
    totals = {"loss": 0.0, "correct": 0.0, "count": 0.0}
    for batch in run.data.validation(run.config.num_eval_batches or None):
        sums = jax.device_get(eval_step(state, run.put(batch)))
        totals = {name: totals[name] + float(sums[name]) for name in totals}
    return {
        "validation_loss": totals["loss"] / totals["count"],
        "validation_accuracy": totals["correct"] / totals["count"],
    }


def find_phase(run: Run, name: str) -> Phase:
    """Return a phase of the run's recipe by name.

    Args:
      run: Run.
      name: str.

    Returns:
      Phase.

    Raises:
      ValueError: if the recipe has no such phase.
    """
    for phase in run.recipe.phases:
        if phase.name == name:
            return phase
    raise ValueError(f"the checkpoint's phase {name!r} is not one of {run.recipe.name!r}")
