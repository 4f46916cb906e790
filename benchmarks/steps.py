"""Whole training steps as callables of a benchmark, each on a state of its own that is donated."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import RESULTS, Case, ForeignCall, Point, run_points
from benchmarks.records import Column, Results
from benchmarks.targets import Target, evaluate
from sparsejax.models import TransformerConfig
from sparsejax.optimizer import Optimizer
from sparsejax.recipes import Phase, Recipe
from sparsejax.training.block_lists import make_block_lists
from sparsejax.training.state import create_train_state, make_graphdef, walk_to_phase
from sparsejax.training.step import Batch, make_train_step


def make_step_call(
    model: TransformerConfig,
    recipe: Recipe,
    phase: Phase,
    optimizer: Optimizer,
    batch: Batch,
    *,
    num_steps: int = 1,
    carries_lists: bool = True,
    **options: Any,
) -> ForeignCall:
    """Make the callable that trains some steps, from wherever the call before has come.

    Nothing is compiled or allocated before the first call.

    Args:
      phase: one of its phases.
      batch: of every step.
      num_steps: int, steps of one call.
      carries_lists: lists of attention blocks are built once, as the trainer does; False builds
        them in every step.
      **options: of `make_train_step`.

    Returns:
      ForeignCall, whose result is the loss of the last step.
    """

    @functools.cache
    def start():
        def create(key):
            state = create_train_state(model, recipe, optimizer, key)
            return walk_to_phase(state, recipe, phase, optimizer)

        state = jax.jit(create)(jax.random.key(0))
        lists = None
        if carries_lists:
            lists = jax.jit(functools.partial(make_block_lists, phase=phase))(state.sparsity.masks)
        step = make_train_step(make_graphdef(model), recipe, phase, optimizer, **options)
        compiled = jax.jit(step, donate_argnums=0).lower(state, batch, lists).compile()

        def train():
            nonlocal state
            metrics = {}
            for _ in range(num_steps):
                state, metrics, *_ = compiled(state, batch, lists)
            return metrics["loss"]

        return train

    return ForeignCall(call=lambda: start()(), wait=jax.block_until_ready, to_numpy=np.asarray)


def make_steps_case(calls: dict[str, ForeignCall], *, num_steps: int = 1) -> Case:
    """Put such callables into a case: what they have in common is that they must train.

    Args:
      calls: name -> what `make_step_call` returned.
      num_steps: int, steps of one call.

    Returns:
      Case, whose times are those of one step.
    """
    return Case(
        functions={},
        args=(),
        reference=lambda: jnp.float32(0),
        tolerance=0.0,
        error=lambda loss, _: 0.0 if np.isfinite(loss) else np.inf,
        foreign=calls,
        units=num_steps,
    )


def make_classification_batch(
    *, batch_size: int, shape: tuple[int, ...], vocab_size: int, num_classes: int
) -> Batch:
    """Draw a batch of random tokens with random labels, nothing of it padding.

    Args:
      batch_size: int, examples.
      shape: of the tokens of an example.

    Returns:
      dict of arrays.
    """
    draw = np.random.default_rng(0)
    return {
        "inputs": jnp.asarray(draw.integers(1, vocab_size, (batch_size, *shape), np.int32)),
        "mask": jnp.ones((batch_size, *shape), bool),
        "labels": jnp.asarray(draw.integers(0, num_classes, batch_size, np.int32)),
        "loss_weights": jnp.ones(batch_size, jnp.float32),
    }


def run_and_evaluate(
    name: str,
    points: Sequence[Point],
    columns: Sequence[Column],
    targets: Sequence[Target],
    **options: Any,
) -> int:
    """Measure the points that are missing; write and print table and targets.

    Args:
      name: str, of the results' files.
      points: of the benchmark.
      columns: of the table.
      targets: to be reached.
      **options: of `run_points`.

    Returns:
      int, exit code: 0 if every step trained. A missed target is no error.
    """
    failures = run_points(name, points, columns, limit_seconds=120.0, **options)
    print(evaluate(targets, Results(RESULTS / f"{name}.json").records))
    return 1 if failures else 0
