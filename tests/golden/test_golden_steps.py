"""Steps of every recipe compute the numbers that they computed before.

After a change that is meant to change numbers, write them anew and say why in the commit:

  python -m tests.golden.test_golden_steps
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.models import sparse_weight_patterns
from sparsejax.patterns import NMPattern, Unstructured
from sparsejax.recipes import (
    FSTConfig,
    MSTConfig,
    SatConfig,
    SSTEConfig,
    make_dense,
    make_fst,
    make_mst,
    make_sat,
    make_sste,
)
from sparsejax.training.state import enter_phase
from tests.small_models import (
    SPARSE_ATTENTION,
    initialise_state,
    make_batch,
    make_config,
    make_small_optimizer,
    make_state,
    make_step,
    prune_attention,
)

_NUMBERS = pathlib.Path(__file__).with_name("train_step.json")
# Programs of dense and sparse attention are those of tests/training/test_step.py, and that of FST
# is one of tests/training/test_fst_runs.py: each compiles once.
_MODEL = make_config(max_length=32, num_kv_heads=1, dropout_rate=0.1)
_ADAMW = make_small_optimizer(schedule="cosine", warmup_fraction=0.02)
# Adam would hide the scale of a gradient.
_DESCENT = make_small_optimizer(name="sgd", learning_rate=2.0)
_LENGTH = 16
_FEW_PARAMETERS = {"use_bias": False}  # which is what compiling takes its time for
_KNOWN_ATTENTION = {"block_size": 8, "length": _LENGTH, "causal": True}


def _measure(state, history):
    """Return numbers of the steps, and of the state that they end in."""
    params = jax.tree.leaves((state.params, state.sparsity.params))
    masks = [np.asarray(mask).ravel() for mask in jax.tree.leaves(state.sparsity.masks)]
    return {
        "loss": [float(metrics["loss"]) for metrics in history],
        "grad_norm": [float(metrics["grad_norm"]) for metrics in history],
        "params_l1": float(sum(jnp.abs(leaf).sum() for leaf in params)),
        "kept": [int(mask.sum()) for mask in masks],
        "mean_index_of_kept": [float(np.flatnonzero(mask).mean()) for mask in masks],
    }


def _run(state, step, num_steps):
    history = []
    for seed in range(num_steps):
        state, metrics, *_ = step(state, make_batch(seed, length=_LENGTH))
        history.append(metrics)
    return state, history


def _run_plain(recipe, prepare=lambda state: state):
    state, history = prepare(initialise_state(_MODEL, recipe, _ADAMW)), []
    step = make_step(_MODEL, recipe, _ADAMW, implementation="xla")
    for seed in range(3):
        state, metrics = step(state, make_batch(seed, length=32))
        history.append(metrics)
    return _measure(state, history)


def _run_sparse_weights(make, pattern, num_steps, weights="mlp/.*"):
    model = make_config(**_FEW_PARAMETERS, sparse_weights=((weights, pattern),))
    recipe = make(sparse_weight_patterns(model))
    state = make_state(model, recipe, _DESCENT)
    return _measure(*_run(state, make_step(model, recipe, _DESCENT), num_steps))


def _run_fst():
    """Three steps with decay, the second of which searches for masks."""
    return _run_sparse_weights(
        lambda patterns: make_fst(
            FSTConfig(decay_rate=0.5, refresh_steps=2, num_steps=12, patterns=patterns)
        ),
        NMPattern(transposable=True),
        3,
    )


def _run_sste():
    """Three steps, in each of which masks follow the weights."""
    return _run_sparse_weights(
        lambda patterns: make_sste(SSTEConfig(flip_interval_steps=2, patterns=patterns)),
        NMPattern(),
        3,
    )


def _run_mst():
    """Six steps of the warm-up, with updates in the third and the fifth."""
    settings = {"sparsity": 0.8, "warmup": 0.5, "restoration": 0.25, "stairs": 3}
    return _run_sparse_weights(
        lambda patterns: make_mst(
            MSTConfig(
                **settings | _KNOWN_ATTENTION,
                update_interval_fraction=0.1,
                num_steps=20,
                patterns=patterns,
            )
        ),
        Unstructured(),
        6,
        weights="mlp/up",
    )


def _run_sat():
    """Three dense steps that probe, and the switch."""
    model = make_config(**_FEW_PARAMETERS)
    recipe = make_sat(
        SatConfig(
            density=0.6,
            num_layers=2,
            num_heads=2,
            head_dim=8,
            latest_switch_fraction=0.3,
            num_steps=10,
            **_KNOWN_ATTENTION,
        )
    )
    state = make_state(model, recipe, _DESCENT)
    state, history = _run(state, make_step(model, recipe, _DESCENT, probes=True), 3)
    return _measure(enter_phase(state, recipe, recipe.phases[1], _DESCENT), history)


_RUNS = {
    "dense": lambda: _run_plain(make_dense()),
    "sparse": lambda: _run_plain(SPARSE_ATTENTION, prune_attention),
    "fst": _run_fst,
    "sste": _run_sste,
    "mst": _run_mst,
    "sat": _run_sat,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.ci] * (name not in ("fst", "mst"))) for name in _RUNS],
)
def test_golden_steps(name):
    # The tolerance is for other processors, not for refactors.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5),
        _RUNS[name](),
        json.loads(_NUMBERS.read_text())[name],
    )


if __name__ == "__main__":
    numbers = {name: run() for name, run in _RUNS.items()}
    _NUMBERS.write_text(json.dumps(numbers, indent=2) + "\n")
