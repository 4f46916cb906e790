"""Pallas GPU kernels on the CPU: interpreted, with races detected and asserted."""

import contextlib
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

# Races are only printed, and an exception leaves the interpreter unusable: neither has a public
# name.
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels.dispatch import check_hopper


@contextlib.contextmanager
def hopper():
    """Run Hopper kernels: on a Hopper GPU, or interpreted and free of races where there is no GPU.

    On another GPU the test is skipped: kernels would be refused there.
    """
    if jax.default_backend() == "gpu":
        try:
            check_hopper()
        except NotImplementedError as reason:
            pytest.skip(str(reason))
        yield
        return
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            _settle()
            yield
        jax.effects_barrier()
        assert not _races_found(), "the interpreter saw a race"
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()


@functools.cache
def _settle():
    """Interpret a first kernel, which changes the context that JAX traces later ones in."""

    def copy(x_gmem, y_gmem):
        y_gmem[...] = x_gmem[...]

    kernel = plgpu.kernel(copy, out_type=jax.ShapeDtypeStruct((128,), jnp.float32))
    jax.block_until_ready(jax.jit(kernel)(jnp.ones(128)))


def _races_found():
    try:
        return interpret_pallas_call.get_races().races_found
    except AssertionError:  # no kernel has run
        return False
