"""What is fixed during a run, and the programs compiled for one of its phases."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparsejax.accounting.units import format_quantity
from sparsejax.config.parse import ConfigError, naming_data
from sparsejax.config.schema import TrainConfig, make_recipe, make_transformer_config
from sparsejax.data import Data, Tokenizer, describe_data, make_data
from sparsejax.models import (
    Choice,
    TransformerConfig,
    VerdictsError,
    record_choices,
    use_recorded,
)
from sparsejax.optimizer import Optimizer, make_optimizer
from sparsejax.processes import count, decide, first_alone
from sparsejax.recipes import Phase, Recipe
from sparsejax.report.progress import say
from sparsejax.sharding import BATCH, list_whole_leaves, use_mesh
from sparsejax.training.block_lists import BlockLists, make_block_lists
from sparsejax.training.devices import (
    find_share,
    make_run_mesh,
    place_arguments,
    place_results,
    place_state,
)
from sparsejax.training.state import (
    TrainState,
    create_train_state,
    enter_phase,
    make_abstract_state,
    make_graphdef,
)
from sparsejax.training.step import Batch, make_eval_step, make_train_step
from sparsejax.types import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The static parts of a run, built once from its settings.

    Attributes:
      config: its settings.
      data: its batches.
      model_config: the model, completed by the data.
      graphdef: static half of the model.
      recipe: what trains it.
      optimizer: its optimizer.
      mesh: the devices of all processes.
      choices: what sparse ops run on, `Choice.call` -> backend: as recorded when the run was
        started, and as chosen since; compiling a phase adds to it.
    """

    config: TrainConfig
    data: Data
    model_config: TransformerConfig
    graphdef: nnx.GraphDef
    recipe: Recipe
    optimizer: Optimizer
    mesh: Mesh
    choices: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def replicated(self) -> NamedSharding:
        """A copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch_sharding(self) -> NamedSharding:
        """The examples of a batch, dealt out over the devices."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH))

    @property
    def tokens_per_step(self) -> int:
        """Positions of a batch, over all processes."""
        data = self.config.data
        return data.batch_size * data.sequence_length * self.model_config.num_towers

    def create_state(self, params: PyTree | None = None) -> TrainState:
        """Initialise the state at step 0 on the devices.

        Args:
          params: nested dict of the model, not to be used again; None draws them.
        """

        def create(seed, params):
            key = jax.random.key(seed)
            return create_train_state(self.model_config, self.recipe, self.optimizer, key, params)

        # Put there explicitly, as a transfer guard may ask.
        seed = jax.device_put(np.asarray(self.config.seed))
        shardings = self.shard_state(self.recipe.phases[0].name)
        jitted = jax.jit(create, out_shardings=shardings, donate_argnums=1)
        with use_mesh(self.mesh), _keeping_choices(self, jitted, seed, params):
            return jitted(seed, params)

    def enter_phase(self, state: TrainState, phase: Phase, *, previous: Phase) -> TrainState:
        """Hand the state over to a later phase.

        Args:
          state: not to be used again.
          phase: the phase that begins.
          previous: the phase that has ended.
        """

        def enter(state):
            return enter_phase(state, self.recipe, phase, self.optimizer, previous=previous)

        jitted = jax.jit(enter, out_shardings=self.shard_state(phase.name))
        with use_mesh(self.mesh), _keeping_choices(self, jitted, state):
            return jitted(state)

    def make_abstract_state(self, phase_name: str) -> TrainState:
        """Return shapes, types and shardings of the state in a phase.

        Args:
          phase_name: of the recipe.

        Raises:
          ValueError: if the recipe has no such phase.
        """
        abstract = make_abstract_state(self.model_config, self.recipe, self.optimizer, phase_name)
        return place_state(abstract, self.mesh)

    def shard_state(self, phase_name: str) -> PyTree:
        """Return where every leaf of the state lies in a phase.

        Args:
          phase_name: of the recipe.

        Raises:
          ValueError: if the recipe has no such phase.
        """
        return jax.tree.map(lambda x: x.sharding, self.make_abstract_state(phase_name))

    def make_block_lists(self, state: TrainState, phase: Phase) -> BlockLists:
        """List the attention blocks that a state keeps, for the steps of a phase.

        Args:
          state: the state.
          phase: its phase.

        Returns:
          None where the phase does not go by carried lists.
        """
        make = functools.partial(make_block_lists, phase=phase)
        with use_mesh(self.mesh):
            return jax.jit(make, out_shardings=self.replicated)(state.sparsity.masks)

    def put_batch(self, batch: dict[str, np.ndarray]) -> Batch:
        """Copy this process's part of a batch to the devices.

        Args:
          batch: arrays with the examples in front.

        Returns:
          Global arrays.
        """
        return jax.tree.map(
            functools.partial(jax.make_array_from_process_local_data, self.batch_sharding), batch
        )


def prepare_run(config: TrainConfig, *, tokenizer: Tokenizer | None = None) -> Run:
    """Open the data and build everything that does not change during training.

    Args:
      config: settings.
      tokenizer: that of a run which is evaluated on the data; None = what the settings name.

    Raises:
      ConfigError: if the data cannot be used as configured, or a setting does not fit it.
    """
    with _opening_data(config):
        spec = describe_data(config.data)
    try:
        model_config = make_transformer_config(config, **spec._asdict())
        recipe = make_recipe(config, model_config)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if model_config.dtype == "float16" and jax.default_backend() == "cpu":
        raise ConfigError(
            "model.dtype must be 'float32' or 'bfloat16', whose products a CPU has, got 'float16'"
        )
    mesh = make_run_mesh(config, model_config)
    # Of several processes this is where they meet, not to be left to one that is alone.
    index, parts = find_share(NamedSharding(mesh, PartitionSpec(BATCH)), config.data.batch_size)
    # After the settings were checked: to prepare data may take hours.
    with _opening_data(config), first_alone("data"):
        data = make_data(config.data, tokenizer=tokenizer, process_index=index, process_count=parts)
    run = Run(
        config=config,
        data=data,
        model_config=model_config,
        graphdef=make_graphdef(model_config),
        recipe=recipe,
        optimizer=make_optimizer(config.optimizer, num_steps=config.schedule_length),
        mesh=mesh,
    )
    _check_implementations(run)
    whole = list_whole_leaves(run.make_abstract_state(recipe.phases[0].name), mesh)
    for path, size in whole.items():
        say(f"note: not cut is {path}, {format_quantity(size, 'B')}")
    return run


@contextlib.contextmanager
def _opening_data(config: TrainConfig) -> Iterator[None]:
    try:
        with naming_data():
            yield
    except OSError as error:
        raise ConfigError(f"data.source={config.data.source!r}: {error}") from error


def _check_implementations(run: Run) -> None:
    """Trace every phase, to fail early if a kernel is unavailable."""
    named = run.config.named_implementations
    if not named:
        return
    batch = run.put_batch(next(run.data.passes["all"](1)))
    options = {**run.config.step_options, "num_micro_batches": 1}
    for phase in run.recipe.phases:
        step = make_eval_step(run.graphdef, run.recipe, phase, **options)
        try:
            with use_mesh(run.mesh):
                jax.eval_shape(step, run.make_abstract_state(phase.name), batch)
        except NotImplementedError as error:
            raise ConfigError(f"{named} must run on this device: {error}") from error


def find_phase(recipe: Recipe, name: str) -> Phase:
    """Return a phase of a recipe by name.

    Args:
      recipe: where it is.
      name: as a checkpoint recorded it.

    Raises:
      ValueError: if the recipe has no such phase.
    """
    for phase in recipe.phases:
        if phase.name == name:
            return phase
    raise ValueError(f"the checkpoint's phase {name!r} is not one of {recipe.name!r}")


class Programs(NamedTuple):
    """The compiled programs of one phase; they cannot recompile, only refuse other shapes.

    Attributes:
      train_step: (state, batch, block_lists) -> (state, metrics); the state is donated.
      eval_step: (state, batch, block_lists) -> totals.
      probing_step: (state, batch, block_lists) -> (state, metrics, Observation), for the steps that
        probe; None in a phase without.
      step_memory_bytes: arguments, results and temporaries of a train step on one device.
      compile_seconds: for all of them together.
    """

    train_step: Callable
    eval_step: Callable
    probing_step: Callable | None
    step_memory_bytes: int
    compile_seconds: float


def compile_evaluation(run: Run, phase: Phase, batch: Batch) -> Callable:
    """Compile a phase's evaluation alone.

    Args:
      run: the run.
      phase: the phase.
      batch: one of the shapes to come.

    Returns:
      Function (state, batch, block_lists) -> totals.
    """
    step = make_eval_step(run.graphdef, run.recipe, phase, **run.config.step_options)
    return _compile(
        run,
        jax.jit(step, out_shardings=run.replicated),
        *_make_abstract_arguments(run, phase, batch),
    )


def compile_phase(run: Run, phase: Phase, batch: Batch) -> Programs:
    """Compile a phase's programs ahead of its first step.

    Args:
      run: the run.
      phase: the phase.
      batch: one of the shapes to come.

    Raises:
      ConfigError: if a sparse op cannot go on on the backend it had when the run was started.
    """
    start = time.perf_counter()
    arguments = _make_abstract_arguments(run, phase, batch)
    build = {**run.config.step_options, "label_smoothing": run.config.label_smoothing}

    def compile_train_step(*, probes):
        step = make_train_step(
            run.graphdef, run.recipe, phase, run.optimizer, **build, probes=probes
        )
        results = place_results(arguments[0], run.mesh, probes=probes)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=results)
        return _compile(run, jitted, *arguments)

    train_step = compile_train_step(probes=False)
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


def _compile(run: Run, jitted: Any, *arguments: Any) -> Any:
    with use_mesh(run.mesh), _keeping_choices(run, jitted, *arguments):
        return jitted.lower(*arguments).compile()


@contextlib.contextmanager
def _keeping_choices(run: Run, jitted: Any, *arguments: Any) -> Iterator[None]:
    """Choose backends as the run did before, and record those that are new.

    Of several processes the first one traces the program before the others, which choose as it did.
    """
    made: list[Choice] = []

    def trace() -> dict[str, str]:
        with use_recorded(run.choices), record_choices() as traced:
            jax.eval_shape(jitted, *arguments)
        return {choice.call: choice.backend for choice in traced}

    try:
        if count() > 1:
            run.choices.update(decide(trace, "choices"))
        with use_recorded(run.choices), record_choices() as made:
            yield
    except VerdictsError as error:
        raise ConfigError(str(error)) from error
    except NotImplementedError as error:
        raise ConfigError(
            f"{error}; resume on the device the run was started on, or start it anew in another "
            "--workdir"
        ) from error
    run.choices.update({choice.call: choice.backend for choice in made})


def _make_abstract_arguments(run: Run, phase: Phase, batch: Batch) -> tuple[Any, ...]:
    state = run.make_abstract_state(phase.name)
    make = functools.partial(make_block_lists, phase=phase)
    lists = jax.eval_shape(make, state.sparsity.masks)
    return place_arguments(state, batch, lists, run.mesh)
