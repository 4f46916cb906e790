"""Short training of a pruned pretrained model, on the standard library's docstrings.

Legend: B sequences, T positions.
"""

import ast
import dataclasses
import hashlib
import pathlib
import pydoc_data.topics
import warnings
from collections.abc import Iterator
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.data import Tokenizer
from sparsejax.models import SparsityMask, Transformer, sparse_weight_patterns
from sparsejax.optimizer import OptimizerConfig, make_optimizer
from sparsejax.patterns import NMPattern
from sparsejax.recipes import Recipe
from sparsejax.recipes.dense import make_dense
from sparsejax.recipes.nm.fst import FSTConfig, make_fst
from sparsejax.training.state import TrainState, trainable
from sparsejax.training.step import make_train_step

type Training = Literal["dense", "fixed masks", "STE", "FST"]
"""Dense; straight through masks that stay; or through masks that are searched by magnitude, without
or with FST's decay."""

BATCH_SIZE, LENGTH, REFRESH_STEPS = 2, 256, 10
_SHORTEST = 300
_LIBRARY = pathlib.Path(pydoc_data.topics.__file__).parents[1]
# Documentation of these is tested on, and what is installed is no part of the library.
_LEFT_OUT = ("idlelib", "email", "pydoc_data", "site-packages", "test", "lib2to3")


class Text(NamedTuple):
    """What is trained on.

    Attributes:
      batches: i32[steps, B, T + 1].
      sha256: of what was encoded.
    """

    batches: np.ndarray
    sha256: str


def make_text(tokenizer: Tokenizer, num_steps: int) -> Text:
    """Encode long docstrings of the standard library, in an order that a seed draws.

    Args:
      tokenizer: of the model.
      num_steps: int, batches.

    Raises:
      ValueError: if there are too few docstrings.
    """
    docstrings = sorted(set(_find_docstrings()))
    np.random.default_rng(0).shuffle(docstrings)
    size = num_steps * BATCH_SIZE * (LENGTH + 1)
    # A token is at least a byte.
    lengths = np.cumsum([len(text.encode()) for text in docstrings])
    text = "\n\n".join(docstrings[: int(np.searchsorted(lengths, 8 * size)) + 1])
    (ids,) = tokenizer.encode([text.encode()])
    if len(ids) < size:
        raise ValueError(f"num_steps must leave {size} tokens, got {len(ids)} for {num_steps=}")
    shape = (num_steps, BATCH_SIZE, LENGTH + 1)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Text(ids[:size].astype(np.int32).reshape(shape), sha256)


def _find_docstrings() -> Iterator[str]:
    for path in sorted(_LIBRARY.rglob("*.py")):
        if set(path.relative_to(_LIBRARY).parts) & set(_LEFT_OUT):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= _SHORTEST:
                    yield text


def train(
    model: Transformer, text: Text, *, training: Training, learning_rate: float
) -> tuple[Transformer, list[float]]:
    """Train from a model's parameters and masks, with AdamW.

    Args:
      model: stays as it is.
      text: of as many batches as there are steps.
      training: how.
      learning_rate: float, after the warm-up, a tenth of the steps.

    Returns:
      Transformer, and the loss of every step.

    Raises:
      ValueError: if a step was skipped.
    """
    num_steps = len(text.batches)
    recipe = _make_recipe(model, training, num_steps)
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=learning_rate, schedule="constant", warmup_fraction=0.1, weight_decay=0.0
        ),
        num_steps=num_steps,
    )
    graphdef, params, masks = nnx.split(model, nnx.Param, SparsityMask)
    # Steps overwrite their state, and others use this model's arrays.
    params, masks = jax.tree.map(jnp.copy, (nnx.to_pure_dict(params), nnx.to_pure_dict(masks)))
    sparsity = recipe.init(masks, params, jax.random.key(0))
    if training == "fixed masks":
        sparsity = dataclasses.replace(sparsity, masks=masks)
    state = TrainState(
        step=jnp.int32(0),
        num_skipped=jnp.int32(0),
        params=params,
        sparsity=sparsity,
        opt_state=optimizer.init(trainable(params, sparsity)),
        key=jax.random.key(1),
    )
    step = make_train_step(graphdef, recipe, recipe.phases[0], optimizer)
    compiled = jax.jit(step, donate_argnums=0)
    losses = []
    for index, ids in enumerate(text.batches):
        batch = {
            "inputs": jnp.asarray(ids[:, :-1]),
            "targets": jnp.asarray(ids[:, 1:]),
            "loss_weights": jnp.ones(len(ids), jnp.float32),
        }
        state, metrics = compiled(state, batch)
        if metrics["skipped"]:
            raise ValueError(f"every step must be finite, but step {index} of {training!r} is not")
        losses.append(float(metrics["loss"]))
        print(f"{training}, step {index}: {losses[-1]:.4f}", flush=True)
    return nnx.merge(graphdef, state.params, state.sparsity.masks), losses


def _make_recipe(model: Transformer, training: Training, num_steps: int) -> Recipe:
    if training == "dense":
        return make_dense()
    patterns = {
        name: pattern
        for name, pattern in sparse_weight_patterns(model.config).items()
        if isinstance(pattern, NMPattern)
    }
    return make_fst(
        FSTConfig(
            variant="fst" if training == "FST" else "ste",
            decay_rate=FSTConfig.decay_rate if training == "FST" else 0.0,
            refresh_steps=num_steps + 1 if training == "fixed masks" else REFRESH_STEPS,
            dense_fraction=0.0,
            num_steps=num_steps,
            patterns=patterns,
        )
    )
