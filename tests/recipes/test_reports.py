"""What recipes tell the ledger of FLOPs and progress lines, and the pictures they draw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from sparsejax.patterns import NMPattern
from sparsejax.recipes import (
    FSTConfig,
    SatConfig,
    SpionConfig,
    SSTEConfig,
    StaticAttentionConfig,
    StepAccount,
    make_dense,
    make_fst,
    make_sat,
    make_spion,
    make_sste,
    make_static_attention,
)
from sparsejax.report.metrics import fetch_metrics
from tests.recipes.two_weights import (
    INTERVAL,
    begin,
    draw,
    gradual_set,
    magnitude,
    make_update,
    mst,
    rigl,
    static_weights,
)

L, LENGTH, BLOCK = 2, 32, 8
MAPS = {"block_size": BLOCK, "length": LENGTH, "num_layers": L, "num_heads": 3, "num_steps": 10}
MASKS = {"blocks": {"attention": {"block_mask": jnp.ones((L, 1, 1, 4, 4), bool)}}}


def read_values(recipe, sparsity, step):
    """Return the metrics of a step as the loop passes them on."""
    metrics = recipe.metrics(sparsity, step=jnp.int32(step), phase=recipe.phases[0])
    return fetch_metrics(metrics)


@pytest.mark.parametrize(
    ("make", "dense_gradient"),
    [(mst, True), (rigl, True), (gradual_set, False), (magnitude, False)],
)
def test_an_update_changes_densities_and_may_need_the_dense_gradient(make, dense_gradient):
    recipe = make()
    sparsity, params = begin(recipe)
    step = 2 * INTERVAL
    sparsity, _, _ = make_update(recipe)(sparsity, params, (), draw(1), jnp.int32(step))
    account = recipe.account(read_values(recipe, sparsity, step))
    assert account.dense_gradient is dense_gradient
    expected = {name: mask.mean((1, 2)) for name, mask in _get_masks(sparsity).items()}
    assert account.weight_density.keys() == expected.keys()
    for name, density in expected.items():
        np.testing.assert_allclose(account.weight_density[name], density, rtol=1e-6)
    assert recipe.account(read_values(recipe, sparsity, step + 1)) == StepAccount()


def _get_masks(sparsity):
    mlp = sparsity.masks["blocks"]["mlp"]
    return {f"mlp/{name}": np.asarray(layer["kernel_mask"]) for name, layer in mlp.items()}


@pytest.mark.parametrize("make", [make_dense, static_weights])
def test_fixed_masks_have_nothing_to_account_for(make):
    assert make().account({"loss": 2.0}) == StepAccount()


def make_fst_recipe():
    patterns = {"mlp/up": NMPattern(n=2, m=4, transposable=True)}
    return make_fst(FSTConfig(num_steps=12, patterns=patterns))


def make_sste_recipe():
    return make_sste(SSTEConfig(patterns={"mlp/up": NMPattern(n=2, m=4)}))


@pytest.mark.parametrize("make", [make_fst_recipe, make_sste_recipe])
def test_flip_rates_are_shown_and_drawn(make, tmp_path):
    recipe = make()
    assert recipe.progress_metrics == (("flip_rate", "flip rate"),)
    rows = [{"kind": "train", "step": step, "loss": 1.0} for step in (1, 2)]
    recipe.draw_run(rows, folder=tmp_path)
    assert not list(tmp_path.iterdir()), "no masks were compared"
    rows[1] |= {"flip_rate": 0.1, "flip_rate/mlp/up": [0.1, 0.2]}
    recipe.draw_run(rows, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["flip_rates.png"]


def test_the_topology_is_drawn_if_masks_change(tmp_path):
    rows = [{"kind": "phase", "phase": "sparse", "step": 0, "dense_step_flops": 8.0}]
    train = {"kind": "train", "phase": "sparse", "loss": 2.0, "step_flops": 4.0}
    rows += [train | {"step": step} for step in range(1, 10)]
    static_weights().draw_run(rows, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    for row in rows[1::INTERVAL]:
        row |= {"mask_density": 0.2, "mask_density/mlp/up": [0.2, 0.2], "update_fraction": 0.3}
    rigl().draw_run(rows, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["topology.png"]


SPION = SpionConfig(quantile=0.7, filter_size=5, **MAPS)
ATTENTION = {
    "spion-cf": functools.partial(make_spion, SPION),
    "sat": functools.partial(make_sat, SatConfig(density=0.5, head_dim=3, causal=True, **MAPS)),
    "static-bigbird": functools.partial(
        make_static_attention,
        StaticAttentionConfig(
            pattern="bigbird",
            density=0.5,
            dense_fraction=0.4,
            num_layers=L,
            num_blocks=4,
            num_steps=10,
        ),
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_patterns_are_drawn_when_a_phase_is_sparse(name, tmp_path, monkeypatch):
    titles, save = [], Figure.savefig

    def note(figure, *args, **options):
        titles.append((figure.get_suptitle(), len(figure.axes)))
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", note)
    recipe = ATTENTION[name]()
    dense, sparse = recipe.phases
    sparsity = recipe.init(MASKS, {}, jax.random.key(0))
    recipe.draw_phase(sparsity, dense, step=0, folder=tmp_path)
    assert not list(tmp_path.iterdir()) and not titles
    sparsity = recipe.enter_phase(sparsity, sparse, previous=recipe.phases[0])
    recipe.draw_phase(sparsity, sparse, step=7, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["attention_patterns.png"]
    # With pooled maps two panels a layer, and the bar of their colours.
    panels = L if name == "static-bigbird" else 2 * L + 1
    assert titles == [(f"{name}: attention blocks from step 7", panels)]


def test_mst_draws_its_attention_in_the_ultra_sparse_phase(tmp_path):
    recipe = mst(attention_stride=32, attention_blocks=True)
    sparsity, _ = begin(recipe)
    for phase, drawn in zip(recipe.phases, (False, True, False), strict=True):
        folder = tmp_path / phase.name
        folder.mkdir()
        recipe.draw_phase(
            recipe.enter_phase(sparsity, phase, previous=recipe.phases[0]),
            phase,
            step=12,
            folder=folder,
        )
        assert (folder / "attention_patterns.png").exists() is drawn
