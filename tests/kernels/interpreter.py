"""Pallas GPU kernels on the CPU: interpreted, with races detected and asserted."""

import contextlib
import functools
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

# Races are only printed, and an exception leaves the interpreter and the tokens that order its
# callbacks unusable: none has a public name.
from jax._src import dispatch
from jax._src.pallas.mosaic_gpu.interpret import (
    gpu_callbacks,
    interpret_pallas_call,
    race_detection_state,
    shared_memory,
)

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
    races = []

    def record(**options):
        races.append(_RaceDetection(**options))
        return races[-1]

    try:
        # Copies and products that share a clock hide races.
        params = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=64)
        with (
            plgpu.force_gpu_interpret_mode(params),
            # JAX itself remembers the races of the last kernel alone.
            mock.patch.object(gpu_callbacks, "GPURaceDetectionState", record),
            mock.patch.object(gpu_callbacks, "wgmma", _wgmma),
            mock.patch.object(gpu_callbacks, "_barrier_arrive", _barrier_arrive),
        ):
            _settle()
            yield
            jax.effects_barrier()
        assert not any(state.races_found for state in races), "the interpreter saw a race"
    finally:
        dispatch.runtime_tokens.clear()
        interpret_pallas_call.reset_gpu_interpret_mode_state()


_RaceDetection = race_detection_state.GPURaceDetectionState
_SMEM = shared_memory.get_memory_space_idx(plgpu.MemorySpace.SMEM)
_jax_wgmma, _jax_barrier_arrive = gpu_callbacks.wgmma, gpu_callbacks._barrier_arrive


def _wgmma(*, thread, **arguments):
    """Multiply, and tell the race detector what is read, which JAX 0.11 leaves out."""
    memory = gpu_callbacks._get_shared_memory()
    # Like a copy: a clock of its own, known to the thread from here on.
    clock = memory.get_clock(thread)
    assert clock is not None
    clock.inc(memory.get_next_tma_thread_id())
    for side in ("a", "b"):
        key_array = arguments[f"{side}_allocation_key_as_array"]
        key = shared_memory.HostAllocationKey.from_array(key_array)
        transforms = gpu_callbacks._remove_noop_transforms(arguments[f"{side}_transforms"])
        access = memory.access(key, jax.tree.map(int, transforms))
        gpu_callbacks.get_races().check_read(
            thread, clock.async_smem_clock, key, access, source_info=arguments["source_info"]
        )
    with memory.lock:
        memory.clocks[thread].update(clock)
    return _jax_wgmma(thread=thread, **arguments)


def _barrier_arrive(token, mesh_location, thread, *arguments, **options):
    """Arrive, after which a copy may overwrite what the thread has read.

    JAX 0.11 wants `commit_smem` before that, as for what was written; the kernels of its own
    `attention_mgpu` do without, for a value in a register has been read.
    """
    memory, races = gpu_callbacks._get_shared_memory(), gpu_callbacks.get_races()
    with memory.lock, races.lock:
        clock, place = memory.clocks[thread], memory.thread_to_vc_position(thread)
        written = [
            write_clock.clock[place]
            for key in memory.mem
            if key.memory_space_id == _SMEM
            for writer, write_clock, *_ in races.writes.get(key, ())
            if writer == thread
        ]
        if max(written, default=0) <= clock.async_smem_clock.clock[place]:
            clock.commit_smem()
    return _jax_barrier_arrive(token, mesh_location, thread, *arguments, **options)


@functools.cache
def _settle():
    """Interpret a first kernel, which changes the context that JAX traces later ones in."""

    def copy(x_gmem, y_gmem):
        y_gmem[...] = x_gmem[...]

    kernel = plgpu.kernel(copy, out_type=jax.ShapeDtypeStruct((128,), jnp.float32))
    jax.block_until_ready(jax.jit(kernel)(jnp.ones(128)))


def miss_barrier(monkeypatch, number):
    """Leave out the barrier that is awaited as the `number`th while kernels are traced."""
    waits = []
    barrier_wait = plgpu.barrier_wait

    def wait_but_once(barrier):
        waits.append(barrier)
        if len(waits) - 1 != number:
            barrier_wait(barrier)

    monkeypatch.setattr(plgpu, "barrier_wait", wait_but_once)
