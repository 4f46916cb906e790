"""Ops on several devices equal the same calls on one, and inputs that are cut stay cut."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels as pk
from pallas_kernels.backends import without_kernels
from pallas_kernels.meshes import run_on_mesh, vary_alike, vary_like
from pallas_kernels.tables import TABLES
from tests.kernels.mesh_cases import list_calls

_ROOT = pathlib.Path(__file__).parents[2]
_CALLS = ["/".join(call) for call in list_calls()]
# What runs on every device, on explicit axes; `make test-all` adds other meshes, the oracles and
# dense products.
_PORTABLE = [call for call in _CALLS if "/xla/explicit" in call]
_REST = [call for call in _CALLS if call not in _PORTABLE]
_FAST = (
    "block_sparse_attention batch/xla/explicit",
    "nm_matmul bits of the batch/xla/shard_map",
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
def portable():
    return _run(_PORTABLE)


@pytest.mark.ci
@pytest.mark.parametrize("call", _PORTABLE)
def test_every_portable_call_on_eight_devices(call, portable):
    assert portable[call] == ""


@pytest.fixture(scope="module")
def rest():
    return _run(_REST)


@pytest.mark.slow
@pytest.mark.parametrize("call", _REST)
def test_every_other_call_on_eight_devices(call, rest):
    assert rest[call] == ""


def test_calls_on_one_device_are_left_alone():
    x = jnp.ones(3)
    assert vary_alike((x,))[0] is x
    assert vary_like(x, x) is x
    (out,) = run_on_mesh(lambda x, whole: (x,), (x,), ("a",), ("a",), parts={"a": 1})
    assert out is x


def test_a_mesh_of_one_device_divides_nothing():
    mesh = jax.make_mesh((1,), ("data",))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((2, 4)), NamedSharding(mesh, P("data")))
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


def _trace_gradient(axis_type, implementation, **options):
    """Trace a product on two H200 that need not be there."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    mesh = AbstractMesh((2,), ("data",), axis_types=(axis_type,), abstract_device=device)
    mask = jnp.broadcast_to(jnp.arange(128)[:, None] % 4 < 2, (128, 128))

    def multiply(x, w):
        return pk.nm_matmul(
            x, w, mask, check_mask=False, implementation=implementation, **options
        ).sum(dtype=jnp.float32)[None]

    with jax.sharding.use_abstract_mesh(mesh):
        if axis_type == AxisType.Auto:
            multiply = jax.shard_map(multiply, in_specs=(P("data"), P()), out_specs=P("data"))
        x, w = (
            jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
            for shape, spec in (((4, 128, 128), P("data")), ((128, 128), P()))
        )
        gradient = jax.grad(lambda x, w: multiply(x, w).sum(), (0, 1))
        return str(jax.jit(gradient).trace(x, w).jaxpr)


@pytest.mark.ci
@pytest.mark.parametrize("axis_type", (AxisType.Auto, AxisType.Explicit))
@pytest.mark.parametrize("implementation", ("mosaic_sm90", "triton"))
def test_a_kernel_works_on_parts_and_sums_the_gradient_of_the_weight(implementation, axis_type):
    if implementation == "triton":
        pytest.importorskip("jax_triton")
    assert "psum" in _trace_gradient(axis_type, implementation)


@pytest.mark.ci
def test_a_kernel_works_on_parts_with_the_bits_of_their_tokens():
    bits = jnp.zeros((4, 32, 128), jnp.uint32)
    traced = _trace_gradient(AxisType.Explicit, "mosaic_sm90", grad_pruning="mvue", bits=bits)
    assert "psum" in traced


@pytest.mark.parametrize(
    ("leading", "is_cut"),
    [((8,), True), ((12,), False), ((4,), False), ((6,), False), ((3, 8), True), ((2, 6), False)],
)
def test_tokens_are_cut_in_whole_groups(leading, is_cut):
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    bits = pk.draw_pruning_bits(jax.random.key(0), (*leading, 8), 4)
    w, mask = jnp.ones((8, 4)), jnp.broadcast_to(jnp.arange(8)[:, None] % 4 < 2, (8, 4))
    spec = P(*[None] * (len(leading) - 1), "data")

    def multiply(x):
        return pk.nm_matmul(x, w, mask, grad_pruning="mvue", bits=bits, implementation="xla")

    with jax.sharding.use_abstract_mesh(mesh):
        x = jax.ShapeDtypeStruct((*leading, 8), jnp.float32, sharding=NamedSharding(mesh, spec))
        assert ("shard_map" in str(jax.make_jaxpr(multiply)(x))) == is_cut


def test_a_kernel_refuses_what_draws_for_all_devices():
    with pytest.raises(NotImplementedError, match="inside jax.shard_map"):
        _trace_gradient(
            AxisType.Explicit, "mosaic_sm90", grad_pruning="mvue", key=jax.random.key(0)
        )
