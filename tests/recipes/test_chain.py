"""Two recipes chained: which phases can occur, what follows what, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from sparsejax.recipes import Observation, Phase, Recipe, chain, list_begun, make_dense

_DENSE, _PROBED = Phase("dense", last_step=6), Phase("dense", probe_every_steps=2)
_SPARSE = Phase("sparse", sparse_attention=True)
_TWO_FOUR = Phase("2:4", sparse_weights=True, last_step=8)
_WEIGHTS = Recipe("fst", (_TWO_FOUR, Phase("finish")))


def _attention(first):
    return Recipe("spion", (first, _SPARSE))


def _names(recipe):
    return [phase.name for phase in recipe.phases]


def test_pairs_that_cannot_occur_are_left_out():
    recipe = chain(_attention(_DENSE), _WEIGHTS)
    assert recipe.name == "spion+fst"
    assert _names(recipe) == ["dense + 2:4", "sparse + 2:4", "sparse + finish"]
    assert [phase.last_step for phase in recipe.phases] == [6, 8, None]
    # Attention may settle after any probe, or never.
    either = chain(_attention(_PROBED), _WEIGHTS)
    assert _names(either) == ["dense + 2:4", "sparse + 2:4", "dense + finish", "sparse + finish"]
    bounded = chain(_attention(_PROBED._replace(last_step=8)), _WEIGHTS)
    assert _names(bounded) == ["dense + 2:4", "sparse + 2:4", "sparse + finish"]


def test_a_pair_has_the_attention_of_one_and_the_weights_of_the_other():
    looks = {"learning_rate_scale": 0.5, "pool_map": jnp.diagonal}
    attention = _attention(_DENSE._replace(**looks))
    weights = Recipe("w", (_TWO_FOUR._replace(grad_pruning="mvue", learning_rate_scale=0.1),))
    first, second = chain(attention, weights).phases
    assert (first.sparse_attention, second.sparse_attention) == (False, True)
    assert first.sparse_weights and first.grad_pruning == "mvue"
    assert (first.pool_map, second.pool_map) == (jnp.diagonal, None)
    assert first.learning_rate_scale == pytest.approx(0.05)


def _walk(recipe, settled_at, num_steps=12):
    phase, path = recipe.phases[0], []
    for step in range(1, num_steps + 1):
        following = recipe.find_next(phase, step=step, settled=step == settled_at)
        if following is not None:
            path.append((step, following.name, [p.name for p in list_begun(phase, following)]))
            phase = following
    return path


@pytest.mark.parametrize(
    ("settled_at", "path"),
    [
        (4, [(4, "sparse + 2:4", ["sparse"]), (8, "sparse + finish", ["finish"])]),
        (8, [(8, "sparse + finish", ["sparse", "finish"])]),
        (10, [(8, "dense + finish", ["finish"]), (10, "sparse + finish", ["sparse"])]),
        (None, [(8, "dense + finish", ["finish"])]),
    ],
)
def test_each_goes_on_when_its_own_time_has_come(settled_at, path):
    assert _walk(chain(_attention(_PROBED), _WEIGHTS), settled_at) == path


def test_what_each_keeps_is_apart_and_both_act_on_one_set_of_masks():
    masks = {"attention": jnp.ones(2, bool), "weights": jnp.ones(2, bool)}

    def make(leaf, **hooks):
        def init(masks, params, key):
            start = make_dense().init(masks, params, key)
            return dataclasses.replace(
                start,
                masks=masks | {leaf: jnp.zeros(2, bool)},
                params={"p": jnp.float32(len(leaf))},
                statistics={"seen": jnp.int32(0)},
            )

        def update(sparsity, params, opt_state, grads, *, step, key, phase, learning_rate):
            seen = sparsity.statistics["seen"] + grads["recipe"]["p"].astype(jnp.int32)
            return (
                dataclasses.replace(sparsity, statistics={"seen": seen}), params + 1, opt_state,
            )  # fmt: skip

        phase = Phase(leaf, sparse_weights=leaf == "weights")
        return Recipe(leaf, (phase,), init=init, update=update, **hooks)

    def observe(sparsity, attention_maps, phase):
        statistics = {"seen": sparsity.statistics["seen"] + 100}
        found = Observation(jnp.bool_(True), {})
        return dataclasses.replace(sparsity, statistics=statistics), found

    recipe = chain(make("attention", observe=observe), make("weights"))
    (phase,) = recipe.phases
    key = jax.random.key(0)
    sparsity = recipe.init(masks, {}, key)
    assert not any(mask.any() for mask in sparsity.masks.values())
    assert sparsity.params == {"attention": {"p": 9.0}, "weights": {"p": 7.0}}
    grads = {"model": {}, "recipe": sparsity.params}
    sparsity, params, _ = recipe.update(
        sparsity, 0, {}, grads, step=jnp.int32(0), key=key, phase=phase, learning_rate=0.1
    )
    assert params == 2
    assert sparsity.statistics == {"attention": {"seen": 9}, "weights": {"seen": 7}}
    sparsity, observation = recipe.observe(sparsity, None, phase)
    assert sparsity.statistics == {"attention": {"seen": 109}, "weights": {"seen": 7}}
    assert observation.change_phase


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (_WEIGHTS, _WEIGHTS, "must leave weights to the second, got 'fst', which makes weights"),
        (_attention(_DENSE), _attention(_DENSE), "must leave attention to the first, got 'spion'"),
        (_attention(_DENSE), _attention(_PROBED), "leave attention to the first"),
        (chain(_attention(_DENSE), _WEIGHTS), _WEIGHTS, "got 'spion.fst', which is a chain"),
        (
            Recipe("a", (Phase("x", learning_rate="restart"),)),
            Recipe("b", (Phase("y", learning_rate="constant"),)),
            "got two that do: 'a' in phase 'x', 'b' in phase 'y'",
        ),
    ],
)
def test_clashes_are_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        chain(first, second)


def test_metrics_of_a_phase_are_those_of_both():
    def make(name, value):
        def init(masks, params, key):
            kept = make_dense().init(masks, params, key)
            return dataclasses.replace(kept, statistics={"value": value})

        def phase_metrics(sparsity, phase):
            return {f"{phase.name}_share": sparsity.statistics["value"]}

        return Recipe(name, (Phase(name),), init=init, phase_metrics=phase_metrics)

    recipe = chain(make("a", 1), make("b", 2))
    sparsity = recipe.init({}, {}, jax.random.key(0))
    assert recipe.phase_metrics(sparsity, recipe.phases[0]) == {"a_share": 1, "b_share": 2}


def test_metrics_of_one_name_are_refused():
    def metrics(sparsity, *, step, phase):
        return {"density": jnp.float32(1)}

    recipe = chain(*(Recipe(n, (Phase(n),), metrics=metrics) for n in ("a", "b")))
    sparsity = recipe.init({}, {}, jax.random.key(0))
    with pytest.raises(ValueError, match="different names, got {'density'}"):
        recipe.metrics(sparsity, step=0, phase=recipe.phases[0])
