"""Saves that several tests look at."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.checkpoint.save import Checkpointer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict
    sparsity: dict
    opt_state: optax.OptState
    key: jax.Array


def make_state(step=0):
    params = {"block": {"w": jnp.arange(12.0).reshape(3, 4) + step, "b": jnp.ones(3, jnp.bfloat16)}}
    return State(
        step=jnp.int32(step),
        params=params,
        sparsity={"block": {"w": params["block"]["w"] > 5, "b": None}, "none_at_all": {}},
        opt_state=optax.adamw(1e-3).init(params),
        key=jax.random.key(7),
    )


def make_abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def open_checkpointer(directory, **options):
    options = {"keep_last": 2, "keep_best": 0, "run_metadata": {}} | options
    return Checkpointer(directory, **options)


def save_steps(directory, steps, **options):
    with open_checkpointer(directory, **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"next_index": step}, metadata={})


def assert_identical(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape, a.sharding) == (b.dtype, b.shape, b.sharding)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
