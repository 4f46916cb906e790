"""Where leaves lie, how columns are dealt, and which meshes are refused."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.config.mesh import MeshConfig, check_parts
from sparsejax.patterns import BlockPattern, NMPattern, WeightBlocks
from sparsejax.sharding import (
    AXES,
    deal_columns,
    find_spec,
    list_whole_leaves,
    make_abstract_mesh,
    shard_tree,
    split_dealt,
)
from sparsejax.training.devices import find_share
from tests.small_models import make_config

SIZES = {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
BOTH = ("fsdp", "tensor")


@pytest.mark.parametrize(
    "path, shape, spec",
    [
        ("params/blocks/attention/qkv/kernel", (3, 32, 96), P(None, BOTH, None)),
        ("params/blocks/attention/out/kernel", (3, 32, 32), P(None, "tensor", "fsdp")),
        ("sparsity/masks/blocks/mlp/up/kernel_mask", (3, 32, 64), P(None, "fsdp", "tensor")),
        ("opt_state/0/mu/model/blocks/mlp/down/kernel", (3, 64, 32), P(None, "tensor", "fsdp")),
        ("sparsity/statistics/masks_before/mlp/up", (3, 32, 64), P(None, "fsdp", "tensor")),
        ("sparsity/statistics/flip_rates/mlp/up", (3,), P()),
        (
            "params/decoder/blocks/cross_attention/key_value/kernel",
            (2, 32, 64),
            P(None, BOTH, None),
        ),
        ("params/embedding/embedding", (256, 32), P("tensor", "fsdp")),
        # Neither axis divides 17 ids: they stay whole, the width is cut.
        ("params/embedding/embedding", (17, 32), P(None, "fsdp")),
        # Four groups of four rows: 16 rows go to fsdp alone.
        ("params/blocks/attention/qkv/kernel", (3, 16, 48), P(None, "fsdp", None)),
        ("sparsity/statistics/map_before", (3, 64, 64), P(None, "fsdp", None)),
        ("params/blocks/mlp/up/bias", (3, 64), P()),
        ("step", (), P()),
    ],
)
def test_weights_masks_and_moments_are_cut_alike(path, shape, spec):
    assert find_spec(path, shape, SIZES) == spec


def test_a_tree_is_placed_by_its_paths():
    tree = {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((32, 64), "float32")}}}
    placed = shard_tree(tree, make_abstract_mesh(SIZES))["mlp"]["up"]["kernel"]
    assert placed.spec == P("fsdp", "tensor")


def test_large_leaves_that_stay_whole_are_listed():
    leaves = {
        "own": jax.ShapeDtypeStruct((512, 1024), "float32"),
        "up": {"kernel": jax.ShapeDtypeStruct((1024, 1024), "float32")},
        "scale": jax.ShapeDtypeStruct((1024,), "float32"),
        "odd": {"up": {"kernel": jax.ShapeDtypeStruct((1023, 1024), "float32")}},
    }
    mesh = make_abstract_mesh(SIZES)
    assert list_whole_leaves(leaves, mesh) == {
        "odd/up/kernel over fsdp": 4 * 1023 * 1024,
        "own over fsdp": 4 * 512 * 1024,
    }
    ids = {"embedding": {"embedding": jax.ShapeDtypeStruct((50257, 64), "float32")}}
    alone = make_abstract_mesh(SIZES | {"fsdp": 1})
    assert list_whole_leaves(leaves | ids, alone) == {
        "embedding/embedding over tensor": 4 * 50257 * 64
    }
    assert list_whole_leaves(leaves | ids, make_abstract_mesh(dict.fromkeys(AXES, 1))) == {}


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_dealt_columns_are_found_again(parts):
    segments, x = (8, 4, 4), np.arange(96).reshape(2, 3, 16)
    dealt = deal_columns(x, segments, parts)
    # What belongs to one part is next to each other.
    size = 16 // parts
    own = [8 // parts, 4 // parts, 4 // parts]
    first = np.concatenate([x[..., s : s + n] for s, n in zip((0, 8, 12), own, strict=True)], -1)
    np.testing.assert_array_equal(dealt[..., :size], first)
    found = [*split_dealt(dealt, segments, parts)]
    np.testing.assert_array_equal(np.concatenate(found, -1), x)
    assert [piece.shape[-1] for piece in found] == [8, 4, 4]


def test_devices_that_are_left_hold_further_copies():
    sizes = {"data": 4, "fsdp": 2, "context": 1, "tensor": 1}
    assert MeshConfig(fsdp=2).fit(8) == sizes
    assert tuple(sizes) == AXES
    assert MeshConfig(data=2, fsdp=2, tensor=2).fit(8)["data"] == 2


@pytest.mark.parametrize(
    "mesh, got",
    [
        (MeshConfig(fsdp=3), "8, got data=-1 x fsdp=3 x context=1 x tensor=1"),
        (MeshConfig(data=2), "8, got data=2 x fsdp=1 x context=1 x tensor=1"),
        (MeshConfig(fsdp=16), "8, got data=-1 x fsdp=16 x context=1 x tensor=1"),
    ],
)
def test_no_device_is_left_out(mesh, got):
    with pytest.raises(
        ValueError, match=f"mesh must have as many parts as there are devices, {got}"
    ):
        mesh.fit(8)


@pytest.mark.parametrize("name, value", [("data", 0), ("data", -2), ("fsdp", 0), ("tensor", -1)])
def test_sizes_are_positive(name, value):
    with pytest.raises(ValueError, match=f"mesh.{name} must be at least 1.* got {value}"):
        MeshConfig(**{name: value})


MODEL = make_config(num_heads=4, num_kv_heads=2, model_dim=32, mlp_dim=64)


def _check(model=MODEL, *, prunes_gradients=False, **sizes):
    sizes = dict.fromkeys(AXES, 1) | sizes
    options = {"batch_size": 16, "num_micro_batches": 2, "prunes_gradients": prunes_gradients}
    check_parts(model, sizes, **options)


def test_what_divides_is_accepted():
    _check(data=2, fsdp=4)
    _check(data=2, tensor=2, context=2)


@pytest.mark.parametrize(
    "changes, sizes, message",
    [
        (
            {},
            {"data": 16},
            "data.batch_size / num_micro_batches must be a multiple of the 16 dev.*",
        ),
        (
            {"max_length": 20, "block": BlockPattern(block_q=4, block_kv=4)},
            {"context": 4, "prunes_gradients": True},
            "data.sequence_length must be a multiple of mesh.context=4 x 4 positions.* got 20",
        ),
        ({}, {"tensor": 2, "context": 4}, "model.num_heads must be a multiple of .* got 4"),
        ({}, {"tensor": 4}, "model.num_kv_heads must be a multiple of mesh.tensor=4, got 2"),
        ({"mlp_dim": 63}, {"tensor": 2}, "model.mlp_dim must be a multiple of .*2, got 63"),
        (
            {"sparse_weights": (("mlp/down", WeightBlocks(64, 16)),)},
            {"tensor": 2},
            "mesh.tensor must be such that 64 rows or columns of mlp/down=64x16 .* of 64, got 2",
        ),
        (
            {"mlp_dim": 88, "sparse_weights": (("mlp/down", NMPattern(2, 8)),)},
            {"tensor": 2},
            "mesh.tensor must be such that 88 rows or columns of mlp/down=2:8 .* of 8, got 2",
        ),
        (
            {"mlp_dim": 4, "sparse_weights": (("mlp/up", NMPattern(2, 4)),)},
            {"tensor": 2},
            "mesh.tensor must be such that 4 rows or columns of mlp/up=2:4 .* of 4, got 2",
        ),
    ],
)
def test_unequal_parts_are_refused(changes, sizes, message):
    with pytest.raises(ValueError, match=message):
        _check(dataclasses.replace(MODEL, **changes), **sizes)


def test_one_process_reads_the_whole_batch():
    mesh = jax.make_mesh((1, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    assert find_share(NamedSharding(mesh, P(("data", "fsdp"))), 8) == (0, 1)
