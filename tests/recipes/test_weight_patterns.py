"""Dynamic sparse training of weights in blocks, of n:m, and of an embedding that is a head too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.masks import count_kept, layer_densities
from sparsejax.patterns import NMPattern, Unstructured, WeightBlocks
from sparsejax.recipes import (
    RigLConfig,
    SETConfig,
    get_weight_masks,
    make_rigl,
    make_set,
)
from sparsejax.recipes.weight_masks import apply_weight_masks, set_gradient_masks
from tests.recipes.two_weights import make_update

L, K, N, V = 2, 24, 16, 20
BLOCKS, TABLE_BLOCKS = WeightBlocks(4, 8), WeightBlocks(5, 4)
INTERVAL = 2


def draw(seed):
    rng = np.random.default_rng(seed)
    up, table = rng.normal(size=(L, K, N)), rng.normal(size=(V, K))
    return {
        "embedding": {"embedding": jnp.float32(table)},
        "blocks": {"mlp": {"up": {"kernel": jnp.float32(up)}}},
    }


def full_masks(blocks):
    up, table = ((L, 6, 2), (4, 6)) if blocks else ((L, K, N), (V, K))
    masks = {
        "embedding": {"embedding_mask": jnp.ones(table, bool)},
        "blocks": {"mlp": {"up": {"kernel_mask": jnp.ones(up, bool)}}},
    }
    if blocks:
        masks["embedding"]["gradient_mask"] = jnp.ones(table, bool)
        masks["blocks"]["mlp"]["up"]["gradient_mask"] = jnp.ones(up, bool)
    return masks


@functools.cache
def make_recipe(blocks):
    patterns = {"mlp/up": Unstructured(), "embedding": Unstructured()}
    if blocks:
        patterns = {"mlp/up": BLOCKS, "embedding": TABLE_BLOCKS}
    config = RigLConfig(
        sparsity=0.5,
        update_interval_fraction=INTERVAL / 100,
        num_steps=100,
        patterns=patterns,
        moments="zero",
    )
    return make_rigl(config)


def expand(mask, like):
    rows, columns = like.shape[-2] // mask.shape[-2], like.shape[-1] // mask.shape[-1]
    return np.kron(np.asarray(mask), np.ones((rows, columns), bool))


def sum_blocks(x, mask):
    rows, columns = x.shape[0] // mask.shape[0], x.shape[1] // mask.shape[1]
    return np.abs(x).reshape(mask.shape[0], rows, mask.shape[1], columns).sum((1, 3))


def expect(mask, w, g, replaced):
    """Drop the smallest and grow the largest gradients, dropped ones included."""
    mask = mask.copy().ravel()
    mask[np.argsort(np.where(mask, w.ravel(), np.inf))[:replaced]] = False
    mask[np.argsort(np.where(mask, -1, g.ravel()))[::-1][:replaced]] = True
    return mask


@pytest.mark.parametrize("blocks", [False, pytest.param(True, marks=pytest.mark.ci)])
def test_layers_and_the_head_drop_and_grow_by_their_pattern(blocks):
    recipe, params = make_recipe(blocks), draw(0)
    sparsity = recipe.init(full_masks(blocks), params, jax.random.key(0))
    moments = {"mu": {"model": draw(9), "recipe": {}}}
    update = make_update(recipe)
    sparsity, params, moments = update(sparsity, params, moments, draw(1), jnp.int32(0))
    old, grads = get_weight_masks(sparsity.masks), draw(2)
    after, new_params, new_moments = update(sparsity, params, moments, grads, jnp.int32(INTERVAL))
    new = get_weight_masks(after.masks)
    assert {name: mask.shape[0] for name, mask in new.items()} == {"mlp/up": L, "embedding": 1}

    shapes = {"mlp/up": (L, K, N), "embedding": (1, V, K)}
    densities = layer_densities(shapes, density=0.5)
    fraction = 0.15 * (1 + np.cos(np.pi * INTERVAL / 75))

    def leaves(tree):
        tree = tree.get("model", tree)
        table = tree["embedding"]["embedding"][None]
        return {"mlp/up": tree["blocks"]["mlp"]["up"]["kernel"], "embedding": table}

    for name, mask in new.items():
        w, g = (np.asarray(leaves(tree)[name]) for tree in (params, grads))
        count = int(count_kept(mask[0].size, densities[name]))
        for layer in range(mask.shape[0]):
            assert mask[layer].sum() == count
            before = np.asarray(old[name][layer])
            scores = [sum_blocks(x[layer], before) for x in (w, g)]
            expected = expect(before, *scores, int(fraction * count))
            np.testing.assert_array_equal(mask[layer].ravel(), expected)
            kept, kept_before = (expand(m, w[layer]) for m in (mask[layer], before))
            weights = np.asarray(leaves(new_params)[name][layer])
            np.testing.assert_array_equal(weights, np.where(kept & kept_before, w[layer], 0))
            m, m_before = (np.asarray(leaves(x["mu"])[name][layer]) for x in (new_moments, moments))
            np.testing.assert_array_equal(m, np.where(kept & ~kept_before, 0, m_before))

    masked = apply_weight_masks(after.masks, grads)
    for name, mask in new.items():
        kept = expand(mask, leaves(grads)[name])
        expected = np.where(kept, leaves(grads)[name], 0)
        np.testing.assert_array_equal(leaves(masked)[name], expected)


def test_blocks_get_their_gradient_everywhere_in_the_step_that_needs_it_only():
    recipe = make_recipe(True)
    sparsity = recipe.init(full_masks(True), draw(0), jax.random.key(0))
    choose = jax.jit(functools.partial(recipe.choose_masks, phase=recipe.phases[0]))
    for step in range(2 * INTERVAL + 1):
        masks = choose(sparsity, step=jnp.int32(step))
        due = step and step % INTERVAL == 0
        for layer in (masks["embedding"], masks["blocks"]["mlp"]["up"]):
            (kept,) = (mask for name, mask in layer.items() if name != "gradient_mask")
            assert not kept.all()
            np.testing.assert_array_equal(layer["gradient_mask"], kept | bool(due))
    assert choose._cache_size() == 1
    grown_at_random = make_set(
        SETConfig(
            num_steps=100, patterns={"mlp/up": BLOCKS}, update_interval_fraction=INTERVAL / 100
        )
    )
    masks = grown_at_random.choose_masks(
        sparsity, step=jnp.int32(INTERVAL), phase=grown_at_random.phases[0]
    )
    assert not masks["blocks"]["mlp"]["up"]["gradient_mask"].all(), "SET reads no gradient"


def test_gradient_masks_follow_the_mask_beside_them():
    masks = full_masks(True)
    kept = jnp.arange(12).reshape(6, 2) % 3 == 0
    masks["blocks"]["mlp"]["up"]["kernel_mask"] = jnp.stack([kept, ~kept])
    got = set_gradient_masks(masks, False)["blocks"]["mlp"]["up"]["gradient_mask"]
    np.testing.assert_array_equal(got, jnp.stack([kept, ~kept]))
    plain = full_masks(False)
    assert jax.tree.structure(set_gradient_masks(plain, True)) == jax.tree.structure(plain)


@pytest.mark.parametrize("growth", ["gradient", pytest.param("random", marks=pytest.mark.ci)])
def test_groups_of_n_in_m_keep_n_whatever_is_replaced(growth):
    config = {"sparsity": 0.5, "update_interval_fraction": INTERVAL / 100, "num_steps": 100}
    config |= {"patterns": {"mlp/up": NMPattern()}}
    recipe = make_rigl(RigLConfig(**config))
    if growth == "random":
        recipe = make_set(SETConfig(**config))
    params = draw(0)
    masks = {"blocks": full_masks(False)["blocks"]}
    sparsity = recipe.init(masks, params, jax.random.key(0))
    update = make_update(recipe)
    moved = 0
    for step in range(2 * INTERVAL + 1):
        before = np.asarray(get_weight_masks(sparsity.masks)["mlp/up"])
        assert (before.reshape(L, K // 4, 4, N).sum(2) == 2).all()
        trained = jax.tree.map(jnp.add, params, draw(20 + step))
        sparsity, params, _ = update(sparsity, trained, {}, draw(step), jnp.int32(step))
        after = np.asarray(get_weight_masks(sparsity.masks)["mlp/up"])
        moved += (after != before).sum()
        assert not np.asarray(params["blocks"]["mlp"]["up"]["kernel"])[~after].any()
    assert moved > 0
