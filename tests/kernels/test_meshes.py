"""Ops on several devices equal the same calls on one, and inputs that are cut stay cut."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.backends import without_kernels
from pallas_kernels.meshes import run_on_mesh, vary_alike, vary_like
from pallas_kernels.tables import TABLES
from tests.kernels.mesh_cases import list_calls

_ROOT = pathlib.Path(__file__).parents[2]
_CALLS = ["/".join(call) for call in list_calls()]
_FAST = (
    "block_sparse_attention batch/xla/explicit",
    "block_sparse_matmul batch/xla/shard_map",
    "nm_matmul batch/xla/explicit",
    "nm_matmul batch/xla/shard_map",
)


def _run(calls):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.mesh_cases", *calls],
        cwd=_ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


def test_eight_devices_compute_what_one_does():
    assert _run(_FAST) == dict.fromkeys(_FAST, "")


@pytest.fixture(scope="module")
def faults():
    return _run([])


@pytest.mark.ci
@pytest.mark.parametrize("call", _CALLS)
def test_every_call_on_eight_devices(call, faults):
    assert faults[call] == ""


def test_calls_on_one_device_are_left_alone():
    x = jnp.ones(3)
    assert vary_alike((x,))[0] is x
    assert vary_like(x, x) is x
    (out,) = run_on_mesh(lambda x, whole: (x,), (x,), ("a",), ("a",), parts={"a": 1})
    assert out is x


def test_a_mesh_of_one_device_divides_nothing():
    mesh = jax.make_mesh((1,), ("data",))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((2, 4)), jax.NamedSharding(mesh, P("data")))
        seen = []

        def double(x, whole):
            seen.append((x.shape, whole))
            return (2 * x,)

        (out,) = run_on_mesh(double, (x,), ("ab",), ("ab",), parts={"a": 1})
        run_on_mesh(double, (x,), ("ab",), ("ab",), parts={"b": 1})
    assert out.tolist() == [[2.0] * 4] * 2
    assert seen == [((2, 4), False), ((2, 4), True)]


@pytest.mark.parametrize("op", TABLES)
def test_kernels_are_not_partitioned(op):
    for backend in without_kernels(TABLES[op]):
        if backend.needs_verdict:
            with pytest.raises(NotImplementedError, match="jax.shard_map"):
                backend.check(None)
        else:
            assert backend in TABLES[op]
