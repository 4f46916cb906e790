"""What the op refuses, in which words, and which backend it chooses."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backends, block_sparse_attention, make_block_schedule
from pallas_kernels.dispatch import target_platform

_X = jnp.ones((2, 32, 4, 8))
_MASK = jnp.ones((1, 1, 2, 2), bool)


def _call(**changes):
    arguments = {"q": _X, "k": _X, "v": _X, "mask_or_schedule": _MASK, "block_q": 16}
    arguments |= {"block_kv": 16} | changes
    return block_sparse_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": _X[0]}, r"q must have axes .*x.shape=\(32, 4, 8\)"),
        ({"q": _X.astype(jnp.int32)}, "must share one of float32.*q.dtype=dtype.'int32'"),
        ({"k": _X.astype(jnp.bfloat16)}, "must share one of float32.*k.dtype=dtype.bfloat16"),
        ({"v": _X[:, :16]}, r"k and v must be .*v.shape=\(2, 16, 4, 8\)"),
        ({"k": _X[:1], "v": _X[:1]}, r"k and v must be .*k.shape=\(1, 32, 4, 8\)"),
        ({"q": _X[:0], "k": _X[:0], "v": _X[:0]}, r"must not be empty, got q.shape=\(0,"),
        ({"k": _X[:, :, :3], "v": _X[:, :, :3]}, "4 query heads .* and 3 key heads"),
        ({"block_q": 12}, "block_q must be .* divides T, got block_q=12, T=32"),
        ({"block_kv": 0}, "block_kv must be .* divides S, got block_kv=0, S=32"),
        ({"block_kv": 16.0}, "block_kv must be a positive int .* got block_kv=16.0"),
        ({"mask_or_schedule": _MASK.astype(int)}, "mask_or_schedule must be bool.* got int32"),
        ({"mask_or_schedule": _MASK[0]}, r"must be bool\[1 or 2, 1 or 4, 2, 2\] .* got bool"),
        ({"mask_or_schedule": jnp.ones((1, 3, 2, 2), bool)}, r"got bool\(1, 3, 2, 2\)"),
        ({"mask_or_schedule": "full"}, "an array, a BlockSchedule or None, got str"),
        (
            {"mask_or_schedule": make_block_schedule(jnp.ones((1, 1, 2, 4), bool))},
            r"got kv_counts: int32\(1, 1, 2\), kv_indices: int32\(1, 1, 2, 4\)",
        ),
        ({"kv_mask": jnp.ones((2, 32))}, r"kv_mask must be bool\[2, 32\], got .*float32"),
        ({"kv_mask": jnp.ones((1, 32), bool)}, r"kv_mask.shape=\(1, 32\)"),
        ({"segment_ids": jnp.ones((2, 32))}, r"segment_ids must be int\[2, 32\]"),
        (
            {"segment_ids": jnp.ones((2, 16), int), "q": _X[:, :16]},
            "segment_ids needs T == S, got T=16, S=32",
        ),
        ({"scale": float("nan")}, "scale must be None or a finite number, got scale=nan"),
        ({"causal": 1}, "causal must be a bool, got causal=1"),
        ({"return_lse": None}, "return_lse must be a bool, got return_lse=None"),
        (
            {"removed_keys_finite": 1},
            "removed_keys_finite must be a bool, got removed_keys_fin.*=1",
        ),
        ({"pruned_logits": "drop"}, "pruned_logits must be 'masked' or 'zero', got 'drop'"),
        ({"implementation": "cuda"}, "implementation must be None or one of .* got 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        _call(**changes)


def test_a_named_kernel_is_never_replaced():
    with pytest.raises(NotImplementedError, match="mosaic_sm90' needs a Hopper .*found 'cpu'"):
        _call(implementation="mosaic_sm90")


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, "xla"),
        ({"mask_or_schedule": make_block_schedule(_MASK)}, "xla"),
        ({"mask_or_schedule": None}, "dense"),
        # Single positions: there are no blocks to skip.
        (
            {"mask_or_schedule": jnp.ones((1, 1, 32, 32), bool), "block_q": 1, "block_kv": 1},
            "dense",
        ),
        ({"mask_or_schedule": jnp.ones((1, 1, 32, 2), bool), "block_q": 1}, "xla"),
    ],
)
def test_choice_follows_what_is_known_while_tracing(changes, chosen, caplog):
    with caplog.at_level(logging.DEBUG, logger=backends.__name__):
        out = _call(**changes)
    assert f"'{chosen}' on cpu: runs everywhere" in caplog.text
    np.testing.assert_array_equal(out, _call(**changes, implementation=chosen))


def test_no_mask_equals_a_full_mask():
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run():
        return _call(mask_or_schedule=None), _call(implementation="xla")

    dense, sparse = run()
    assert float(jnp.abs(dense - sparse).max()) < 1e-6


def test_the_abstract_mesh_in_force_names_the_platform():
    assert target_platform() == jax.devices()[0].platform
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert target_platform() == "gpu"
