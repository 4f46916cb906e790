"""Copies that the programs of a cluster share, as JAX's interpreter is taught them.

JAX's own interpreter lets each program copy the whole tile to itself. Here, as on a GPU, each
copies one part, to all programs, and a barrier counts the copy once all parts are there. So a part
lands in the memory of another program, which is a race unless that one has given its slot back.
"""

import collections
import contextlib
import dataclasses
import math
import threading
import time
from unittest import mock

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, shared_memory

_KeyOf = shared_memory.HostAllocationKey.from_array


class _Landed:
    """Clocks of the parts of copies that have landed, by barrier and place."""

    def __init__(self):
        self._lock = threading.Lock()
        self.reset()

    def reset(self):
        """Forget everything."""
        self._clocks = collections.defaultdict(list)

    def add(self, key, clock, parts):
        """Add a part; return the joint clock if it was the last of `parts`, else None."""
        with self._lock:
            clocks = self._clocks[key]
            clocks.append(clock)
            if len(clocks) < parts:
                return None
            del self._clocks[key]
        joint = clocks[0].copy()
        for other in clocks[1:]:
            joint.update(other)
        return joint

    def finish(self):
        """Raise if a part has landed without the others."""
        if self._clocks:
            raise AssertionError("programs of a cluster did not share the same copies")


_landed = _Landed()
_tracing = threading.RLock()
_jax_copy = jaxpr_interpret.JaxprInterpreter._interpret_copy_gmem_to_smem_p


class _Part(gpu_callbacks.AsyncCopyGmemToSmemTask):
    """What one program copies to one of its cluster."""

    def __init__(self, *, tile, parts, **arguments):
        super().__init__(**arguments)
        self._tile, self._parts = tile, parts

    def post_write(self, tma_thread_id, shared_memory):
        """Arrive at the barrier for the whole tile, with the last of its parts."""
        clock = _landed.add((id(self.barrier), self._tile), self.clock, self._parts)
        if clock is not None:
            self.barrier.arrive(self.thread, clock, self.logging_info)


def _take_part(access, rank, parts):
    """Return a part of an access: of its first axis that is not one index."""
    axis = next(i for i, x in enumerate(access.range) if isinstance(x, slice))
    whole = access.range[axis]
    size = (whole.stop - whole.start) // parts
    part = slice(whole.start + rank * size, whole.start + (rank + 1) * size, whole.step)
    return dataclasses.replace(
        access, range=(*access.range[:axis], part, *access.range[axis + 1 :])
    )


def _await_memory(memory, keys):
    """Wait until the other programs of a cluster have their memory, as they have on a GPU."""
    for _ in range(10_000):
        with memory.lock:
            if all(key in memory.mem for key in keys):
                return
        time.sleep(0.001)
    raise AssertionError("a program of the cluster has not begun")


def _make_multicast(parts):
    @gpu_callbacks.fail_on_exception
    def copy(*, token, mesh_location, thread, source_info=None, **arguments):
        memory = gpu_callbacks._get_shared_memory()
        source, target, barrier = (
            _KeyOf(arguments[f"{name}_allocation_key_as_array"])
            for name in ("src", "dst", "barrier")
        )
        from_access, to_access = (
            memory.access(key, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms)))
            for key, transforms in (
                (source, arguments["src_transforms"]),
                (target, arguments["dst_transforms"]),
            )
        )
        for program in range(parts):
            own = [dataclasses.replace(key, block_id=program) for key in (target, barrier)]
            _await_memory(memory, own)
            memory.execute_async_task(
                _Part(
                    tile=(own[0].buffer_id, str(to_access)),
                    parts=parts,
                    mesh_location=mesh_location,
                    thread=thread,
                    src_allocation_key=source,
                    src_access=_take_part(from_access, thread.block_id, parts),
                    dst_allocation_key=own[0],
                    dst_access=_take_part(to_access, thread.block_id, parts),
                    barrier_allocation_key=own[1],
                    source_info=source_info,
                    clock=memory.incr_clock(thread),
                )
            )
        return token

    return copy


def _interpret_copy(interpreter, eqn, token, get_invals):
    with _tracing:
        if not eqn.params["collective_axes"]:
            return _jax_copy(interpreter, eqn, token, get_invals)
        parts = math.prod(interpreter.thread_cluster_shape[:-1])
        with mock.patch.object(gpu_callbacks, "copy_gmem_to_smem", _make_multicast(parts)):
            return _jax_copy(interpreter, eqn, token, get_invals)


@contextlib.contextmanager
def share_copies():
    """Let programs of a cluster share copies."""
    _landed.reset()
    with mock.patch.object(
        jaxpr_interpret.JaxprInterpreter, "_interpret_copy_gmem_to_smem_p", _interpret_copy
    ):
        yield
        jax.effects_barrier()
        _landed.finish()
