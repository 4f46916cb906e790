"""Pallas GPU kernels on the CPU: interpreted, with races detected and asserted.

Asynchronous products read their operands as late as their waits allow (`asynchronous`), and sparse
ones are taught to JAX's interpreter (`sparse_products`), as are copies that the programs of a
cluster share (`multicast`).
"""

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
    jaxpr_interpret,
    race_detection_state,
    shared_memory,
)

from pallas_kernels.dispatch import check_hopper
from pallas_kernels.hopper import ring
from pallas_kernels.hopper.ring import Ring
from tests.kernels import sparse_products
from tests.kernels.asynchronous import take_time
from tests.kernels.multicast import share_copies


@contextlib.contextmanager
def hopper(copies="early", seed=0):
    """Run Hopper kernels: on a Hopper GPU, or interpreted and free of races where there is no GPU.

    On another GPU the test is skipped: kernels would be refused there.

    Args:
      copies: when copies land: "early", as soon as they are started; "late", not before a thread
        waits for them; or "random".
      seed: int, of what is random.
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
        params = plgpu.InterpretGPUParams(
            detect_races=True, num_tma_threads_per_device=64, **_GO_ON_AFTER_A_RACE
        )
        with (
            plgpu.force_gpu_interpret_mode(params),
            # JAX itself remembers the races of the last kernel alone.
            mock.patch.object(gpu_callbacks, "GPURaceDetectionState", record),
            mock.patch.object(gpu_callbacks, "_barrier_arrive", _barrier_arrive),
            mock.patch.object(
                jaxpr_interpret.JaxprInterpreter, "_interpret_inline_mgpu_p", _interpret_inline
            ),
            take_time(copies, seed),
            share_copies(),
        ):
            sparse_products.reset()
            _settle()
            yield
            jax.effects_barrier()
        assert not any(state.races_found for state in races), "the interpreter saw a race"
    finally:
        dispatch.runtime_tokens.clear()
        interpret_pallas_call.reset_gpu_interpret_mode_state()


# JAX 0.12 would raise at the first race, in a thread of its own; 0.11 only prints it, has no such
# parameter, and goes on to the values.
_GO_ON_AFTER_A_RACE = {"on_race": "warn"} if hasattr(plgpu.InterpretGPUParams, "on_race") else {}
_RaceDetection = race_detection_state.GPURaceDetectionState
_SMEM = shared_memory.get_memory_space_idx(plgpu.MemorySpace.SMEM)
_jax_barrier_arrive = gpu_callbacks._barrier_arrive
_jax_inline = jaxpr_interpret.JaxprInterpreter._interpret_inline_mgpu_p


def _interpret_inline(interpreter, eqn, token, get_invals):
    return sparse_products.interpret_inline(_jax_inline, interpreter, eqn, token, get_invals)


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
    jax.block_until_ready(jax.jit(kernel)(jnp.ones(128, jnp.float32)))


def miss_barrier(monkeypatch, number):
    """Leave out the barrier that is awaited as the `number`th while kernels are traced."""
    waits = []
    barrier_wait = plgpu.barrier_wait

    def wait_but_once(barrier):
        waits.append(barrier)
        if len(waits) - 1 != number:
            barrier_wait(barrier)

    monkeypatch.setattr(plgpu, "barrier_wait", wait_but_once)


def free_in_own_program(monkeypatch):
    """Let a slot be free when readers of its own program are done, not all of the cluster's."""

    def describe(slots, readers, cluster):
        del cluster
        return plgpu.Barrier(num_arrivals=readers, num_barriers=slots)

    monkeypatch.setattr(ring, "_describe_free", describe)


def give_back_early(patch):
    """Give tiles of attention back as soon as they have arrived, before they are multiplied."""
    give_back, wait = Ring.give_back, Ring.wait

    def give_back_and_use(ring, slot):
        tiles = wait(ring, slot)
        give_back(ring, slot)
        return tiles

    patch.setattr(Ring, "wait", give_back_and_use)
    patch.setattr(Ring, "give_back", lambda *_: None)
