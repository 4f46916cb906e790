"""The steps of a run, built without its data: what plans compile and the doctor asks about."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sparsejax.batch import describe_batch
from sparsejax.config.schema import TrainConfig, make_recipe, make_transformer_config
from sparsejax.data import DataSpec, describe_data
from sparsejax.models import record_choices
from sparsejax.optimizer import make_optimizer
from sparsejax.recipes import Phase
from sparsejax.sharding import make_abstract_mesh
from sparsejax.training.block_lists import make_block_lists
from sparsejax.training.devices import check_run_parts
from sparsejax.training.state import make_abstract_state, make_graphdef
from sparsejax.training.step import make_eval_step, make_train_step

TRAIN, EVALUATION, PROBE = "train step", "evaluation step", "probing train step"


class Steps(NamedTuple):
    """The steps of one phase.

    Attributes:
      functions: "train step", "evaluation step" and, in a phase that probes, "probing train step"
        -> function (state, batch, block_lists).
      arguments: shapes and types of state, batch and block_lists.
    """

    functions: dict[str, Callable[..., Any]]
    arguments: tuple[Any, Any, Any]


def make_steps(config: TrainConfig, spec: DataSpec, phase: Phase) -> Steps:
    """Build the steps of one phase.

    Args:
      config: settings of the run.
      spec: DataSpec of the data set.
      phase: Phase of the configured recipe.
    """
    model = make_transformer_config(config, **spec._asdict())
    recipe, graphdef = make_recipe(config, model), make_graphdef(model)
    optimizer = make_optimizer(config.optimizer, num_steps=config.schedule_length)
    options = config.step_options
    training = {**options, "label_smoothing": config.label_smoothing}
    functions: dict[str, Callable[..., Any]] = {
        TRAIN: make_train_step(graphdef, recipe, phase, optimizer, **training),
        EVALUATION: make_eval_step(graphdef, recipe, phase, **options),
    }
    if phase.probe_every_steps:
        functions[PROBE] = make_train_step(
            graphdef, recipe, phase, optimizer, probes=True, **training
        )
    state = make_abstract_state(model, recipe, optimizer, phase.name)
    lists = jax.eval_shape(functools.partial(make_block_lists, phase=phase), state.sparsity.masks)
    return Steps(functions, (state, make_abstract_batch(config, spec), lists))


def make_abstract_batch(config: TrainConfig, spec: DataSpec) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes and types of the batches that `make_data` gives.

    Args:
      config: settings of the run.
      spec: DataSpec of the data set.
    """
    arrays = describe_batch(
        spec.task,
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        patch_values=spec.patch_values,
    )
    return {name: jax.ShapeDtypeStruct(*array) for name, array in arrays.items()}


def list_kernel_calls(config: TrainConfig) -> list[tuple[str, Any]]:
    """List the sparse ops that the steps of a run call without naming a backend, by tracing them.

    Args:
      config: settings of the run; a mesh.data of -1 counts as 1.

    Returns:
      list of (op, its static facts), each once.

    Raises:
      ValueError: if the data cannot be described, or settings contradict each other.
    """
    spec = describe_data(config.data)
    model = make_transformer_config(config, **spec._asdict())
    recipe = make_recipe(config, model)
    check_run_parts(config, model, config.mesh.sizes)
    # No device is asked for: they are those of the run.
    mesh = make_abstract_mesh(config.mesh.sizes)
    with record_choices() as choices, jax.sharding.use_abstract_mesh(mesh):
        for phase in recipe.phases:
            steps = make_steps(config, spec, phase)
            for function in steps.functions.values():
                jax.eval_shape(function, *steps.arguments)
    return list(dict.fromkeys((c.op, c.facts) for c in choices if not c.is_named))
