"""Rates, moments and decay of the optimizer; where settings say so, they are those of PyTorch.

PyTorch's arithmetic is written down here from its documentation and source.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.optimizer import compute_b1, compute_learning_rate, make_optimizer
from sparsejax.recipes import Phase
from sparsejax.training.state import trainable
from tests.small_models import make_optimizer_config, make_small_optimizer
from tests.training import toy

_OPTIMIZER = make_small_optimizer(schedule="cosine", warmup_fraction=0.02)
_PEAK, _STEPS, _WARMUP = 3e-4, 60, 12
_RELEASED = {
    "schedule": "torch_one_cycle",
    "cycle_momentum": True,
    "warmup_fraction": _WARMUP / _STEPS,
    "learning_rate": _PEAK,
    "b2": 0.999,
    "eps": 1e-6,
}


def test_learning_rate_follows_the_phase():
    def rate(step, **settings):
        return float(
            compute_learning_rate(
                _OPTIMIZER, Phase("phase", **settings), jnp.int32(step), jnp.int32(40)
            )
        )

    assert rate(2) == pytest.approx(1e-2)
    assert rate(41, learning_rate="restart") == pytest.approx(rate(1))
    assert rate(77, learning_rate="constant", learning_rate_scale=0.5) == pytest.approx(5e-3)
    assert rate(100) == pytest.approx(1e-3)


def test_one_cycle_rises_and_falls_linearly():
    schedule = make_optimizer(
        make_optimizer_config(schedule="one_cycle", warmup_fraction=1 / 11), num_steps=110
    ).schedule
    assert float(schedule(0)) == pytest.approx(1e-2 / 25, rel=1e-4)
    assert float(schedule(10)) == pytest.approx(1e-2)
    assert float(schedule(60)) == pytest.approx(0.5e-2, rel=1e-3)
    assert float(schedule(110)) == pytest.approx(1e-2 / 25e4, rel=1e-3)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant", "triangle"])
def test_the_first_step_of_a_warm_up_has_the_rate_that_is_asked_for(schedule):
    for first in (0.0, 0.25):
        config = make_optimizer_config(
            schedule=schedule, warmup_fraction=0.2, initial_fraction=first
        )
        rates = [float(make_optimizer(config, num_steps=50).schedule(step)) for step in (0, 5, 10)]
        np.testing.assert_allclose(rates, [first * 1e-2, (1 + first) * 0.5e-2, 1e-2], rtol=1e-5)


def test_inverse_sqrt_rises_linearly_and_falls_with_the_root_of_the_step():
    schedule = make_optimizer(
        make_optimizer_config(schedule="inverse_sqrt", warmup_fraction=1 / 11), num_steps=110
    ).schedule
    expected = {0: 0.1e-2, 4: 0.5e-2, 9: 1e-2, 39: 0.5e-2, 89: 1e-2 / 3}
    assert {step: float(schedule(jnp.int32(step))) for step in expected} == pytest.approx(expected)


def test_a_triangle_rises_from_its_first_rate_and_falls_to_zero():
    settings = {"schedule": "triangle", "warmup_fraction": 0.75}
    for first in (0.0, 0.25):
        config = make_optimizer_config(**settings, initial_fraction=first)
        schedule = make_optimizer(config, num_steps=40).schedule
        rates = [float(schedule(step)) / 1e-2 for step in (0, 15, 30, 35, 40)]
        np.testing.assert_allclose(rates, [first, (1 + first) / 2, 1, 0.5, 0], atol=1e-6)


def test_wsd_stays_at_the_peak_and_falls_linearly_at_the_end():
    config = make_optimizer_config(schedule="wsd", warmup_fraction=0.1, decay_fraction=0.25)
    schedule = make_optimizer(config, num_steps=100).schedule
    rates = [float(schedule(step)) / 1e-2 for step in (0, 5, 10, 75, 85, 100)]
    np.testing.assert_allclose(rates, [0, 0.5, 1, 1, 0.64, 0.1], rtol=1e-5)
    with pytest.raises(ValueError, match=r"at step 75 of 100, got 0.8: 80 steps"):
        make_optimizer(dataclasses.replace(config, warmup_fraction=0.8), num_steps=100)


def test_adamw_is_that_of_optax():
    import optax

    ours = make_optimizer(make_optimizer_config(), num_steps=10)
    theirs = optax.adamw(1e-2, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    params = {"kernel": jnp.linspace(-1, 1, 6)}
    grads = {"kernel": jnp.cos(jnp.arange(6.0))}
    updates, _ = ours.update(grads, ours.init(params), params)
    expected, _ = theirs.update(grads, theirs.init(params), params)
    np.testing.assert_allclose(1e-2 * updates["kernel"], expected["kernel"], rtol=1e-6)


@pytest.mark.parametrize(
    ("decay_embeddings", "decayed"),
    [("none", {"kernel"}), ("tokens", {"kernel", "embedding"})]
    + [("all", {"kernel", "embedding", "position"})],
)
def test_only_matrices_decay(decay_embeddings, decayed):
    config = make_optimizer_config(
        name="sgd", b1=0.0, weight_decay=0.5, decay_embeddings=decay_embeddings
    )
    optimizer = make_optimizer(config, num_steps=10)
    # Stacked biases have two axes too.
    names = ("kernel", "bias", "scale", "embedding", "position")
    params = {name: jnp.ones((2, 3)) for name in names}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert {name for name, x in updates.items() if (x == -0.5).all()} == decayed
    assert {name for name, x in updates.items() if (x == 0).all()} == {*names} - decayed


class _OneCycleLR:
    """torch.optim.lr_scheduler.OneCycleLR with anneal_strategy="linear" and its other defaults."""

    def __init__(self, max_lr, total_steps, pct_start):
        initial_lr = max_lr / 25
        self.phases = [
            (float(pct_start * total_steps) - 1, initial_lr, max_lr, 0.95, 0.85),
            (total_steps - 1, max_lr, initial_lr / 1e4, 0.85, 0.95),
        ]
        self.last_epoch = -1
        self.step()

    def step(self, epoch=None):
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        start = 0
        for end, first_lr, last_lr, first_b1, last_b1 in self.phases:
            if self.last_epoch <= end or end == self.phases[-1][0]:
                pct = (self.last_epoch - start) / (end - start)
                self.lr = (last_lr - first_lr) * pct + first_lr
                self.b1 = (last_b1 - first_b1) * pct + first_b1
                return
            start = end


def _train_as_spion_cf(scheduler, switch):
    """Return rate and b1 of each step of main_conv_ff.py that switches after step `switch`."""
    used, transition_step = [], None
    for step in range(_STEPS):
        used.append((scheduler.lr, scheduler.b1))  # optimizer.step()
        if transition_step is None:
            scheduler.step(step)
        else:
            scheduler.step(step - transition_step)
        if step == switch:
            transition_step = step
    return used


def _train_as_spion_f(scheduler, switch):
    """The same of main_ff.py, whose schedule goes on."""
    del switch
    used = []
    for _ in range(_STEPS):
        used.append((scheduler.lr, scheduler.b1))
        scheduler.step()
    return used


def _train_as_sat(scheduler, switch):
    """The same of main_learnable_skewness.py, whose new optimizer has no scheduler."""
    used, fresh = [], False
    for step in range(_STEPS):
        used.append((0.5 * _PEAK, 0.9) if fresh else (scheduler.lr, scheduler.b1))
        scheduler.step()
        fresh = fresh or step == switch
    return used


@pytest.mark.parametrize(
    ("loop", "late", "sparse"),
    [
        (_train_as_spion_cf, True, {"learning_rate": "restart"}),
        (_train_as_spion_f, False, {"learning_rate": "schedule"}),
        (_train_as_sat, False, {"learning_rate": "constant", "learning_rate_scale": 0.5}),
    ],
    ids=["SPION-CF", "SPION-F", "SAT"],
)
@pytest.mark.parametrize("switch", [4, 30])
def test_rates_and_momenta_are_those_of_the_released_loops(loop, late, sparse, switch):
    expected = loop(_OneCycleLR(_PEAK, _STEPS, _WARMUP / _STEPS), switch)
    config = make_optimizer_config(**_RELEASED, late_schedule=late)
    optimizer = make_optimizer(config, num_steps=_STEPS)
    steps, first = jnp.arange(_STEPS), switch + 1

    def compute(phase, steps):
        begun = jnp.int32(first if phase.name == "sparse" else 0)
        found = [f(optimizer, phase, steps, begun) for f in (compute_learning_rate, compute_b1)]
        return np.stack([np.broadcast_to(x, steps.shape) for x in found], 1)

    dense = compute(Phase("dense"), steps[:first])
    got = np.concatenate([dense, compute(Phase("sparse", **sparse), steps[first:])])
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-10)


def test_the_released_schedule_peaks_a_step_earlier():
    schedule = make_optimizer(make_optimizer_config(**_RELEASED), num_steps=_STEPS).schedule
    rates = [float(schedule(step)) for step in range(_STEPS)]
    assert np.argmax(rates) == _WARMUP - 1
    assert rates[_WARMUP - 1] == pytest.approx(_PEAK)
    assert rates[0] == pytest.approx(_PEAK / 25) and rates[-1] == pytest.approx(_PEAK / 25e4)


def _torch_adamw(theta, grads, rates_and_momenta, *, b2, eps, weight_decay):
    """torch.optim.AdamW: theta after each step; bias corrections with the step's own betas."""
    first = second = np.zeros_like(theta)
    for t, (g, (lr, b1)) in enumerate(zip(grads, rates_and_momenta, strict=True), 1):
        theta = theta - lr * weight_decay * theta
        first = b1 * first + (1 - b1) * g
        second = b2 * second + (1 - b2) * g * g
        step_size, root = lr / (1 - b1**t), np.sqrt(second) / np.sqrt(1 - b2**t)
        theta = theta - step_size * first / (root + eps)
        yield theta


def test_adamw_with_a_cycled_b1_is_that_of_torch():
    rng = np.random.default_rng(0)
    theta, grads = 0.1 * rng.normal(size=7), rng.normal(size=(_STEPS, 7))
    scheduler = _OneCycleLR(_PEAK, _STEPS, _WARMUP / _STEPS)
    expected = _torch_adamw(
        theta, grads, _train_as_spion_f(scheduler, None), b2=0.999, eps=1e-6, weight_decay=0.1
    )
    optimizer = make_optimizer(make_optimizer_config(**_RELEASED), num_steps=_STEPS)

    @jax.jit
    def step(params, opt_state, grad, i):
        when = (Phase("dense"), i, jnp.int32(0))
        rate, b1 = compute_learning_rate(optimizer, *when), compute_b1(optimizer, *when)
        updates, opt_state = optimizer.update({"kernel": grad}, opt_state, params, b1=b1)
        return jax.tree.map(lambda w, u: w + rate * u, params, updates), opt_state

    params = {"kernel": jnp.asarray(theta, jnp.float32)}
    opt_state, moved = optimizer.init(params), []
    for i, (grad, after) in enumerate(zip(grads, expected, strict=True)):
        params, opt_state = step(params, opt_state, jnp.asarray(grad, jnp.float32), jnp.int32(i))
        moved.append((np.asarray(params["kernel"]) - theta, after - theta))
    got, expected = (np.array(x) for x in zip(*moved, strict=True))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=3e-7)
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("step", "b1"), [(_WARMUP - 1, 0.85), pytest.param(0, 0.95, marks=pytest.mark.ci)]
)
def test_a_step_takes_the_b1_of_its_own_place_in_the_schedule(step, b1):
    recipe = toy.make_recipe(Phase("only"))
    optimizer = make_optimizer(make_optimizer_config(**_RELEASED), num_steps=_STEPS)
    state = toy.make_state(recipe, step=step)
    opt_state = optimizer.init(trainable(state.params, state.sparsity))
    state = dataclasses.replace(state, opt_state=opt_state)
    state, _ = toy.run_step(recipe, state, optimizer)
    expected = (1 - b1) * toy.loss_and_gradient(toy.TABLE)[1]
    np.testing.assert_allclose(
        state.opt_state[0].mu["model"]["table"], expected, rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cycle_momentum": True}, "cycle_momentum must be False for 'adamw' with schedule 'const"),
        (
            {"name": "lion", "schedule": "one_cycle", "cycle_momentum": True},
            "cycle_momentum must be False for 'lion' with schedule 'one_cycle', got True",
        ),
        ({"decay_embeddings": "some"}, r"decay_embeddings must be one of \('none', .* got 'some'"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer_config(**changes)
