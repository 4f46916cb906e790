"""The whole state of a run as one pytree, and how it changes between phases."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparsejax.models import SparsityMask, Transformer, TransformerConfig, make_transformer
from sparsejax.optimizer import Optimizer
from sparsejax.recipes import Phase, Recipe, Sparsity, list_begun
from sparsejax.types import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a checkpoint holds and a step maps to its successor.

    Attributes:
      step: i32[], steps done.
      num_skipped: i32[], steps in a row that were skipped up to now.
      params: nested dict, f32 master weights of the model.
      sparsity: Sparsity, masks and whatever the recipe keeps.
      opt_state: optimizer state over `trainable(state)`.
      key: typed random key of the run; never advanced, always folded with the step.
    """

    step: jax.Array
    num_skipped: jax.Array
    params: PyTree
    sparsity: Sparsity
    opt_state: optax.OptState
    key: jax.Array


def trainable(params: PyTree, sparsity: Sparsity) -> PyTree:
    """Return the tree that gradients are taken of and the optimizer updates.

    Args:
      params: nested dict of the model.

    Returns:
      dict with the keys "model" and "recipe".
    """
    return {"model": params, "recipe": sparsity.params}


def make_graphdef(config: TransformerConfig) -> nnx.GraphDef:
    """Return the static half of the model, without allocating its parameters.

    Returns:
      nnx.GraphDef for `nnx.merge(graphdef, params, masks)`.
    """
    model = nnx.eval_shape(lambda: make_transformer(config, rngs=nnx.Rngs(0)))
    return nnx.split(model, nnx.Param, SparsityMask)[0]


def create_train_state(
    config: TransformerConfig,
    recipe: Recipe,
    optimizer: Optimizer,
    key: jax.Array,
    params: PyTree | None = None,
) -> TrainState:
    """Initialise parameters, masks, recipe and optimizer.

    Args:
      key: typed random key.
      params: nested dict of the model; None draws them.

    Returns:
      TrainState at step 0 in the recipe's first phase.
    """
    model = make_transformer(config, rngs=nnx.Rngs(params=jax.random.fold_in(key, 0)))
    _, drawn, masks = nnx.split(model, nnx.Param, SparsityMask)
    masks = nnx.to_pure_dict(masks)
    if params is None:
        params = nnx.to_pure_dict(drawn)
    sparsity = recipe.init(masks, params, jax.random.fold_in(key, 1))
    return TrainState(
        step=jnp.int32(0),
        num_skipped=jnp.int32(0),
        params=params,
        sparsity=sparsity,
        opt_state=optimizer.init(trainable(params, sparsity)),
        key=jax.random.fold_in(key, 2),
    )


def enter_phase(
    state: TrainState,
    recipe: Recipe,
    phase: Phase,
    optimizer: Optimizer,
    *,
    previous: Phase | None = None,
) -> TrainState:
    """Hand the state over to a later phase of the recipe.

    Args:
      state: TrainState at the end of the phase before.
      phase: Phase that begins.
      optimizer: Optimizer, asked for fresh state if the phase resets it.
      previous: Phase that has ended; None = the one before in `recipe.phases`.

    Returns:
      TrainState whose structure is that of the new phase.
    """
    if previous is None:
        previous = recipe.phases[recipe.phases.index(phase) - 1]
    sparsity = recipe.enter_phase(state.sparsity, phase, previous=previous)
    begun = list_begun(previous, phase)
    # Where a part of a phase goes on, so does the learning rate that it has chosen.
    if not phase.parts or any(part.learning_rate != "schedule" for part in begun):
        sparsity = dataclasses.replace(sparsity, phase_start_step=state.step)
    opt_state = state.opt_state
    if any(part.reset_optimizer for part in begun):
        opt_state = optimizer.init(trainable(state.params, sparsity))
    return dataclasses.replace(state, sparsity=sparsity, opt_state=opt_state)


def make_abstract_state(
    config: TransformerConfig, recipe: Recipe, optimizer: Optimizer, phase_name: str
) -> TrainState:
    """Return shapes and types of the state in a phase, for compiling and restoring.

    Args:
      phase_name: str, a phase of the recipe.

    Raises:
      ValueError: if the recipe has no such phase.
    """
    phases = {phase.name: phase for phase in recipe.phases}
    if phase_name not in phases:
        raise ValueError(
            f"phase must be one of {[*phases]} in recipe {recipe.name!r}, got {phase_name!r}"
        )

    def build():
        state = create_train_state(config, recipe, optimizer, jax.random.key(0))
        return walk_to_phase(state, recipe, phases[phase_name], optimizer)

    return jax.eval_shape(build)


def merge_model(config: TransformerConfig, params: PyTree, masks: PyTree) -> Transformer:
    """Put parameters and masks into a model.

    Args:
      params: nested dict of arrays, as in TrainState.
      masks: nested dict of bool arrays, as in Sparsity.
    """
    return nnx.merge(make_graphdef(config), params, masks)


def walk_to_phase(
    state: TrainState, recipe: Recipe, phase: Phase, optimizer: Optimizer
) -> TrainState:
    """Hand a state of the first phase over to any other, through those in between.

    Args:
      state: TrainState in the recipe's first phase.
      phase: Phase to come to.
      optimizer: Optimizer, asked for fresh state where a phase resets it.

    Returns:
      TrainState whose structure is that of the phase.
    """
    first = recipe.phases[0]
    if recipe.parts:
        # The parts go their ways by themselves.
        path = [] if phase == first else [phase]
    else:
        path = recipe.phases[1 : recipe.phases.index(phase) + 1]
    previous = first
    for later in path:
        state = enter_phase(state, recipe, later, optimizer, previous=previous)
        previous = later
    return state
