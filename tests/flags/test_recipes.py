"""Every recipe traced where types are wide and ranks are strict: states and metrics stay narrow."""

import functools

import jax
import pytest

from sparsejax.config.parse import parse_config
from sparsejax.training.setup import prepare_run
from sparsejax.training.step import make_eval_step, make_train_step
from tests.flags.flags import assert_narrow, flags_set
from tests.flags.recipes import RECIPES, make_settings

pytestmark = pytest.mark.ci


@pytest.mark.parametrize("name", RECIPES)
def test_states_and_metrics_stay_narrow(tmp_path, name):
    config = parse_config(make_settings(tmp_path, name))
    with flags_set("x64", "rank_promotion"):
        run = prepare_run(config)
        batch = run.put_batch(next(run.data.train))
        options = dict(graphdef=run.graphdef, recipe=run.recipe)
        for phase in run.recipe.phases:
            state = run.make_abstract_state(phase.name)
            assert_narrow(state, f"{phase.name}: state")
            lists = jax.eval_shape(functools.partial(run.make_block_lists, phase=phase), state)
            for probes in {False, bool(phase.probe_every_steps)}:
                step = make_train_step(
                    optimizer=run.optimizer, phase=phase, probes=probes, **options
                )
                results = jax.eval_shape(step, state, batch, lists)
                assert_narrow(results, f"{phase.name}: train step, {probes=}: ")
                jax.tree.map(assert_same_type, results[0], state)
            evaluate = make_eval_step(phase=phase, **options)
            assert_narrow(
                jax.eval_shape(evaluate, state, batch, lists), f"{phase.name}: evaluation"
            )


def assert_same_type(x, y):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
