"""Tensor-core products and copies that take their time, which JAX's interpreter runs at once.

A product reads its operands when the wait that covers it has come, which is as late as it may. A
copy lands when it is started, or not before a thread waits for it, or at random in between.
"""

import collections
import contextlib
import functools
import random
import threading
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory

_KeyOf = shared_memory.HostAllocationKey.from_array


class _Products:
    """Groups of products of each thread that were started and not waited for."""

    def __init__(self):
        self._started = collections.defaultdict(collections.deque)

    def start(self, thread, run):
        """Note a group; `run` computes it."""
        self._started[thread].append(run)

    def wait(self, thread, most):
        """Run all but the last `most` groups."""
        started = self._started[thread]
        while len(started) > most:
            started.popleft()()

    def finish(self, thread):
        """Raise if a thread ends while a product is in flight."""
        if self._started.pop(thread, None):
            raise ValueError(f"{thread} ended with products in flight")

    def reset(self):
        """Forget everything."""
        self._started.clear()


class _Copies:
    """Copies that were started and have not landed."""

    def __init__(self):
        self._lock = threading.Lock()
        self.reset("early", 0)

    def reset(self, when, seed):
        """Forget everything, and let copies land "early", "late" or at "random"."""
        assert when in ("early", "late", "random"), when
        self._when, self._seed = when, seed
        self._loads = collections.defaultdict(list)  # by identity of barrier
        self._stores = collections.defaultdict(collections.deque)  # by thread
        self._waiting = collections.Counter()  # threads, by barrier
        self._draws = collections.defaultdict(int)

    def _random(self, thread):
        # By thread: which of them comes first is not the seed's to say.
        self._draws[thread] += 1
        return random.Random(f"{self._seed} {thread} {self._draws[thread]}")

    def start(self, memory, task):
        """Start a copy."""
        chance = self._random(task.thread)
        land = functools.partial(_land, memory, task)
        late = self._when == "late" or (self._when == "random" and chance.random() < 0.7)
        if isinstance(task, gpu_callbacks.AsyncCopySmemToGmemTask):
            # In order: waits count from the last.
            if late or self._stores[task.thread]:
                self._stores[task.thread].append(land)
            else:
                land()
            return
        with self._lock:
            late &= not self._waiting[id(task.barrier)]
            if late:
                self._loads[id(task.barrier)].append(land)
            others = [b for b in self._loads if b != id(task.barrier) or not late]
            others = [b for b in others if self._loads[b]]
            now = [] if late else [land]
            if self._when == "random" and others and chance.random() < 0.5:
                loads = self._loads[chance.choice(others)]
                now.append(loads.pop(chance.randrange(len(loads))))
        for landing in now:
            landing()

    @contextlib.contextmanager
    def wait_for_loads(self, thread, barrier):
        """Let copies land that a thread is about to wait for."""
        with self._lock:
            self._waiting[id(barrier)] += 1
            loads = self._loads.pop(id(barrier), [])
        self._random(thread).shuffle(loads)
        try:
            for landing in loads:
                landing()
            yield
        finally:
            with self._lock:
                self._waiting[id(barrier)] -= 1

    def finish(self):
        """Raise if a copy has landed for nobody."""
        if any(self._loads.values()) or any(self._stores.values()):
            raise AssertionError("a copy was started that no thread waited for")

    def wait_for_stores(self, thread, most):
        """Let all but the last `most` copies to global memory land; return how many did not."""
        stores = self._stores[thread]
        while len(stores) > most:
            stores.popleft()()
        return len(stores)


def _land(memory, task):
    task(memory.get_next_tma_thread_id())


PRODUCTS = _Products()
_COPIES = _Copies()


def read_operand(thread, key_array, transforms, *, asynchronous=True):
    """Read shared memory as a product does, and tell the race detector.

    Args:
      thread: who started it.
      key_array: allocation key.
      transforms: of the reference.
      asynchronous: bool, False for what a thread loads itself.

    Returns:
      array.
    """
    memory, key = gpu_callbacks._get_shared_memory(), _KeyOf(key_array)
    transforms = gpu_callbacks._remove_noop_transforms(transforms)
    access = memory.access(key, jax.tree.map(int, transforms))
    value, _, _ = memory.get_buffer_content(key, access, thread)
    # Like a copy: a clock of its own, known to the thread from here on.
    clock = memory.get_clock(thread)
    assert clock is not None and value is not None
    clock.inc(memory.get_next_tma_thread_id())
    seen = clock.async_smem_clock if asynchronous else clock.generic_clock
    gpu_callbacks.get_races().check_read(thread, seen, key, access)
    with memory.lock:
        memory.clocks[thread].update(clock)
    return value


_jax = {
    name: getattr(gpu_callbacks, name)
    for name in ("wgmma_accumulator_deref", "wait_smem_to_gmem", "kernel_thread_finished")
}
_jax_barrier_wait = shared_memory.Barrier.wait


@gpu_callbacks.fail_on_exception
def _wgmma(*, token, thread, acc_allocation_key_as_array, acc_transforms, **arguments):
    memory, key = gpu_callbacks._get_shared_memory(), _KeyOf(acc_allocation_key_as_array)
    access = memory.access(key, jax.tree.map(int, acc_transforms))
    operands = [
        (arguments[f"{side}_allocation_key_as_array"], arguments[f"{side}_transforms"])
        for side in "ab"
    ]

    def run():
        a, b = (read_operand(thread, *operand).astype("float32") for operand in operands)
        acc, _, _ = memory.get_buffer_content(key, access, thread)
        with np.errstate(all="ignore"):  # NaN is a number like others
            product = a @ b
        memory.store_buffer_content(key, access, acc + product, thread)

    PRODUCTS.start(thread, run)
    return token


@gpu_callbacks.fail_on_exception
def _wgmma_accumulator_deref(*, thread, wait_n, **arguments):
    if wait_n is not None:
        PRODUCTS.wait(thread, wait_n)
    return _jax["wgmma_accumulator_deref"](thread=thread, wait_n=wait_n, **arguments)


@gpu_callbacks.fail_on_exception
def _wait_smem_to_gmem(*, thread, n, **arguments):
    # JAX counts those that have landed.
    n -= _COPIES.wait_for_stores(thread, n)
    return _jax["wait_smem_to_gmem"](thread=thread, n=n, **arguments)


@gpu_callbacks.fail_on_exception
def _kernel_thread_finished(*, thread, **arguments):
    PRODUCTS.finish(thread)
    _COPIES.wait_for_stores(thread, 0)
    return _jax["kernel_thread_finished"](thread=thread, **arguments)


def _barrier_wait(self, thread, logging_info=None):
    with _COPIES.wait_for_loads(thread, self):
        _jax_barrier_wait(self, thread, logging_info)


def _execute_async_task(memory, task):
    _COPIES.start(memory, task)


def wgmma_wait(n):
    """Wait for all but n groups, as a function that the interpreter can be taught."""

    @plgpu.inline_mgpu()
    def wait(_):
        raise AssertionError(f"interpreted only, {n=}")

    wait()


@contextlib.contextmanager
def take_time(copies="early", seed=0):
    """Let products run at their waits, and copies land when they are told to.

    Args:
      copies: "early", "late" or "random".
      seed: int, of what is random.
    """
    PRODUCTS.reset()
    _COPIES.reset(copies, seed)
    with contextlib.ExitStack() as stack:
        for where, name, replacement in (
            (gpu_callbacks, "wgmma", _wgmma),
            (gpu_callbacks, "wgmma_accumulator_deref", _wgmma_accumulator_deref),
            (gpu_callbacks, "wait_smem_to_gmem", _wait_smem_to_gmem),
            (gpu_callbacks, "kernel_thread_finished", _kernel_thread_finished),
            (shared_memory.Barrier, "wait", _barrier_wait),
            (shared_memory.GPUSharedMemory, "execute_async_task", _execute_async_task),
            (plgpu, "wgmma_wait", wgmma_wait),
        ):
            stack.enter_context(mock.patch.object(where, name, replacement))
        yield
        # Threads work for as long as results are awaited.
        jax.effects_barrier()
        _COPIES.finish()
