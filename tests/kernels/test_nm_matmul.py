"""The contract of `nm_matmul` on every portable implementation, and on broken ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import nm_matmul, prune_mvue
from pallas_kernels.doctor.oracles import error, make_nm_masks, make_normal
from pallas_kernels.nm_matmul import straight_through
from pallas_kernels.nm_matmul.activations import (
    ACTIVATIONS,
    activation_gradient,
    apply_activation,
)
from pallas_kernels.nm_matmul.call import NMArrays, NMFacts
from pallas_kernels.nm_matmul.mvue import prune_tokens
from pallas_kernels.nm_matmul.straight_through import NMProducts
from pallas_kernels.nm_matmul.xla import XLA_PRODUCTS
from tests.kernels import float64, nm_contract
from tests.kernels.nm_contract import (
    NM_CASES,
    NMCase,
    call_nm,
    check_nm_case,
    check_pruned_gradient,
    compile_nm_case,
    expected_nm_results,
)
from tests.tiers import tier

_FAST = ["transposable", "geglu", "one_of_four", "two_of_eight", "mvue_exact", "bf16"]
PRUNING = {
    name: dataclasses.replace(case, leading=(2, 13), activation=activation)
    for (name, case), activation in zip(
        ((n, c) for n, c in NM_CASES.items() if c.grad_pruning != "none"),
        (None, "geglu", "swiglu", "gelu"),
        strict=True,
    )
}


@pytest.mark.parametrize("case", tier(NM_CASES, fast=_FAST))
def test_contract(case):
    check_nm_case(case, "xla")


@pytest.mark.ci
def test_reference_in_bf16_meets_the_contract():
    check_nm_case(NM_CASES["bf16"], "reference", optimise=False)


@pytest.mark.ci
@pytest.mark.parametrize("case", PRUNING.values(), ids=PRUNING.keys())
def test_two_of_four_tokens_make_the_weight_gradient(case):
    check_pruned_gradient(case, "xla", optimise=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_equation(activation):
    case = NMCase(leading=(2, 9), has_bias=True, activation=activation)
    mask = case.masks()["underfull"]
    got = compile_nm_case(case, call_nm("reference"), optimise=False)(*case.inputs(), mask)
    x, w, bias = (np.asarray(a, np.float64) for a in case.inputs())
    dy = np.asarray(case.cotangent(), np.float64)
    kept = np.where(mask, w, 0)
    y, dz = float64.activated(x @ kept + bias, activation, dy)
    dw = np.einsum("bsk,bsn->kn", x, dz)
    for actual, expected in zip(got, (y, dz @ kept.T, dw, dz.sum(axis=(0, 1))), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.ci
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_from_zero(activation):
    (d_out,) = make_normal(((3, 8) if activation in (None, "gelu") else (3, 4),))
    z = jnp.array([-200.0, -30.0, -4.0, -1e-3, 1e-3, 4.0, 30.0, 200.0]) * jnp.ones((3, 1))
    act, dz = float64.activated(np.float64(z), activation, np.float64(d_out))
    np.testing.assert_allclose(apply_activation(z, activation), act, rtol=1e-5, atol=1e-5)
    got = activation_gradient(z, d_out, activation)
    np.testing.assert_allclose(got, dz, rtol=1e-5, atol=1e-5)


def _with(**changes):
    """Return nm_matmul on XLA's products, some replaced."""
    products = XLA_PRODUCTS._replace(**changes)

    def matmul(x, w, mask, *, key=None, bias=None, activation=None, grad_pruning, **_):
        arrays = NMArrays(x.reshape(-1, x.shape[-1]), w, mask, None, bias, key)
        facts = NMFacts(
            rows=arrays.x.shape[0],
            inner=w.shape[0],
            columns=w.shape[1],
            dtype=x.dtype.name,
            grad_pruning=grad_pruning,
            activation=activation,
        )
        out = straight_through.multiply_straight_through(arrays, facts, products)
        return out.reshape(*x.shape[:-1], -1)

    return matmul


def _mask_dropped_in_dx(dz, w, mask, packed):
    return XLA_PRODUCTS.input_gradient(dz, w, jnp.ones_like(mask), packed)


def _mask_of_the_wrong_axis(x, w, mask, packed, bias, *options):
    # The circulant masks turned by a quarter: 2:4 both ways, and not where they should be.
    mask = mask.reshape(mask.shape[0] // 4, 4, -1, 4).swapaxes(1, 3).reshape(mask.shape)
    return XLA_PRODUCTS.forward(x, w, mask, packed, bias, *options)


def _masked_dw(case):
    mask = case.masks()["whole"]
    return lambda *args: jnp.where(mask, XLA_PRODUCTS.weight_gradient(*args), 0)


def _scale_off(x, dz, key, grad_pruning):
    dw = XLA_PRODUCTS.weight_gradient(x, dz, key, grad_pruning)
    return dw if grad_pruning == "none" else dw * jnp.asarray(0.97, dw.dtype)


def _groups_of_scattered_tokens(x, dz, key, grad_pruning):
    """Prune tokens 0, M/4, M/2, 3M/4 as one group."""
    order = jnp.arange(len(dz)).reshape(4, -1).T.reshape(-1)
    pruned = prune_tokens(dz[order], key, grad_pruning)
    return XLA_PRODUCTS.weight_gradient(x[order], pruned, None, "none")


def _bias_lost(x, w, mask, packed, bias, *options):
    return XLA_PRODUCTS.forward(x, w, mask, packed, None, *options)


def _gate_and_value_swapped(x, w, mask, packed, bias, *options):
    w, mask = (jnp.roll(a, a.shape[1] // 2, axis=1) for a in (w, mask))
    return XLA_PRODUCTS.forward(x, w, mask, packed, bias, *options)


_ROWS = dataclasses.replace(NM_CASES["mvue"], leading=(24,))


@pytest.mark.parametrize(
    ("case", "name", "changes"),
    [
        (NM_CASES["plain"], "dx", {"input_gradient": _mask_dropped_in_dx}),
        pytest.param(
            NM_CASES["bf16_geglu"],
            "dx",
            {"input_gradient": _mask_dropped_in_dx},
            marks=pytest.mark.ci,
        ),
        pytest.param(
            NM_CASES["plain"],
            "dw",
            {"weight_gradient": _masked_dw(NM_CASES["plain"])},
            marks=pytest.mark.ci,
        ),
        (NM_CASES["transposable"], "y", {"forward": _mask_of_the_wrong_axis}),
        pytest.param(NM_CASES["bf16"], "y", {"forward": _bias_lost}, marks=pytest.mark.ci),
        pytest.param(
            NM_CASES["swiglu"], "y", {"forward": _gate_and_value_swapped}, marks=pytest.mark.ci
        ),
        (_ROWS, "dw", {"weight_gradient": _scale_off}),
        pytest.param(
            _ROWS, "dw", {"weight_gradient": _groups_of_scattered_tokens}, marks=pytest.mark.ci
        ),
        pytest.param(
            NM_CASES["bf16_mvue"], "dw", {"weight_gradient": _scale_off}, marks=pytest.mark.ci
        ),
    ],
)
def test_contract_rejects_broken_implementations(case, name, changes):
    with pytest.raises(AssertionError, match=f": {name} off by"):
        check_nm_case(case, _with(**changes), optimise=False)


@pytest.mark.ci
def test_contract_accepts_the_products_that_were_not_broken():
    check_nm_case(NM_CASES["bf16_geglu"], _with(), optimise=False)


@pytest.mark.ci
@pytest.mark.parametrize("broken", [_scale_off, _groups_of_scattered_tokens])
def test_contract_rejects_a_broken_pruned_gradient(broken):
    case = dataclasses.replace(PRUNING["mvue_exact"], leading=(2, 12))
    with pytest.raises(AssertionError, match="pruned gradient off by"):
        check_pruned_gradient(case, _with(weight_gradient=broken), optimise=False)


@pytest.mark.ci
def test_contract_rejects_a_program_per_mask(monkeypatch):
    case = dataclasses.replace(NM_CASES["plain"], mask_names=("whole", "empty"))

    def compile_per_mask(case, matmul, **_):
        return lambda *args: compile_nm_case(case, matmul, optimise=False)(*args)

    expected_nm_results(case)
    monkeypatch.setattr(nm_contract, "compile_nm_case", compile_per_mask)
    with pytest.raises(AssertionError, match="a new mask compiled a new program"):
        check_nm_case(case, "xla")


@pytest.mark.ci
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_nothing_leaks_from_pruned_weights(implementation):
    case = NMCase(has_bias=True, activation="geglu", grad_pruning="mvue")
    run = compile_nm_case(case, call_nm(implementation), optimise=False)
    x, w, bias = case.inputs()
    mask = case.masks()["underfull"]
    clean = run(x, jnp.where(mask, w, -1.0), bias, mask)
    for poison in (jnp.nan, jnp.inf):
        poisoned = run(x, jnp.where(mask, w, poison), bias, mask)
        for a, b in zip(clean, poisoned, strict=True):
            np.testing.assert_array_equal(a, b)
    assert all(bool(jnp.isfinite(a).all()) for a in clean)


def _loss(x, w, mask, key, implementation="xla"):
    y = nm_matmul(
        *(x, w, mask),
        key=key,
        grad_pruning="mvue",
        activation="swiglu",
        implementation=implementation,
    )
    return (y**2).sum()


@pytest.mark.ci
def test_vmap_over_inputs_weights_masks_and_keys():
    (x, w) = make_normal(((3, 8, 16), (3, 16, 8)))
    masks = jnp.stack([make_nm_masks((16, 8), (2, 4), seed=s)["whole"] for s in range(3)])
    keys = jax.random.split(jax.random.key(0), 3)
    gradient = jax.jit(jax.grad(_loss, argnums=(0, 1)))
    together = jax.jit(jax.vmap(jax.grad(_loss, argnums=(0, 1))))(x, w, masks, keys)
    for index in range(3):
        alone = gradient(x[index], w[index], masks[index], keys[index])
        for a, b in zip(together, alone, strict=True):
            assert error(a[index], b) < 1e-5


@pytest.mark.ci
def test_layers_scan_over_stacked_masks_with_remat():
    (x, w) = make_normal(((2, 6, 16), (3, 16, 32)))
    masks = jnp.stack([make_nm_masks((16, 32), (2, 4), seed=s)["underfull"] for s in range(3)])
    keys = jax.random.split(jax.random.key(0), 3)

    @functools.partial(jax.jit, static_argnums=2)
    def gradient(x, w, implementation):
        @jax.checkpoint
        def layer(x, leaves):
            w, mask, key = leaves
            y = nm_matmul(
                *(x, w / 4, mask),
                key=key,
                grad_pruning="mvue_exact",
                activation="geglu",
                implementation=implementation,
            )
            return x + y, None

        def loss(x, w):
            return (jax.lax.scan(layer, x, (w, masks, keys))[0] ** 2).sum()

        return jax.grad(loss, argnums=(0, 1))(x, w)

    for a, b in zip(gradient(x, w, "xla"), gradient(x, w, "reference"), strict=True):
        assert error(a, b) < 1e-4 * (1 + float(jnp.abs(b).max()))


@pytest.mark.ci
def test_jit_agrees_with_eager_and_repeats_to_the_bit():
    (x, w) = make_normal(((8, 16), (16, 8)))
    mask = jnp.asarray(make_nm_masks((16, 8), (2, 4))["whole"])
    value_and_gradient = jax.value_and_grad(_loss, argnums=(0, 1))
    compiled, key = jax.jit(value_and_gradient), jax.random.key(0)
    first, second = (jax.tree.leaves(compiled(x, w, mask, key)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    eager = jax.tree.leaves(value_and_gradient(x, w, mask, key))
    assert max(error(a, b) for a, b in zip(eager, first, strict=True)) < 1e-4


@pytest.mark.ci
def test_weight_gradient_of_a_gated_layer_is_unbiased():
    (x, w) = make_normal(((10, 16), (16, 8)))
    mask = jnp.asarray(make_nm_masks((16, 8), (2, 4))["whole"])
    keys = jax.random.split(jax.random.key(0), 4000)
    gradient = jax.grad(_loss, argnums=1)
    draws = np.asarray(jax.jit(jax.vmap(gradient, (None, None, None, 0)))(x, w, mask, keys))
    dense = jax.grad(
        lambda w: (nm_matmul(x, w, mask, activation="swiglu", implementation="xla") ** 2).sum()
    )(w)
    deviation = draws.std(axis=0) / np.sqrt(len(keys))
    assert (deviation > 0).all()
    assert (np.abs(draws.mean(axis=0) - dense) / deviation).max() < 4.5


def test_little_is_kept_for_the_backward_pass():
    (x, w) = make_normal(((8, 16), (16, 8)))
    mask = jnp.asarray(make_nm_masks((16, 8), (2, 4))["whole"])

    def kept_shapes(activation):
        def apply(x, w):
            return nm_matmul(x, w, mask, activation=activation, implementation="xla")

        _, back = jax.vjp(apply, x, w)
        return sorted(a.shape for a in jax.tree.leaves(back))

    # A transposed or masked copy of w would show.
    assert kept_shapes(None) == [(8, 16), (16, 8), (16, 8)]
    assert kept_shapes("gelu") == [(8, 8), (8, 16), (16, 8), (16, 8)]


@pytest.mark.ci
def test_products_are_a_plain_tuple():
    assert isinstance(XLA_PRODUCTS, NMProducts) and hash(XLA_PRODUCTS)
    x = jnp.ones((4, 4))
    pruned, _ = prune_mvue(x, jax.random.key(0), axis=0)
    np.testing.assert_array_equal(prune_tokens(x, jax.random.key(0), "mvue"), pruned)
    assert prune_tokens(x, None, "none") is x
