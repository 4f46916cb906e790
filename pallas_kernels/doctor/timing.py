"""Time callables fairly: random data, warm up, interleave, one sample of each in turns."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def make_random(specs: Any, *, seed: int = 0) -> Any:
    """Make standard normal arrays.

    Zeros and constants must not be timed: a GPU draws less power on them and clocks higher.

    Args:
      specs: pytree of `jax.ShapeDtypeStruct`, floating dtypes.
      seed: int, equal seeds give equal data.

    Returns:
      pytree of arrays shaped like `specs`.
    """
    leaves, treedef = jax.tree.flatten(specs)
    keys = jax.random.split(jax.random.key(seed), max(len(leaves), 1))
    arrays = [
        jax.random.normal(key, leaf.shape, jnp.float32).astype(leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(treedef, arrays)


def relative_error(actual: Any, expected: Any) -> float:
    """Return the largest relative error over the leaves of two pytrees.

    max over leaves of |actual - expected| / |expected|, Frobenius norms in f32.

    Args:
      actual: pytree of arrays.
      expected: pytree of arrays of the same structure and shapes.

    Returns:
      float; infinite if a leaf holds a NaN or an infinity where `expected` does not.

    Raises:
      ValueError: if structures or shapes differ.
    """
    if jax.tree.structure(actual) != jax.tree.structure(expected):
        raise ValueError(
            f"actual has the structure {jax.tree.structure(actual)}, expected one like "
            f"{jax.tree.structure(expected)}"
        )
    errors = [0.0]
    for y, r in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if y.shape != r.shape:
            raise ValueError(f"actual has a leaf of shape {y.shape}, expected {r.shape}")
        y, r = y.astype(jnp.float32), r.astype(jnp.float32)
        error = float(jnp.linalg.norm(y - r) / jnp.maximum(jnp.linalg.norm(r), 1e-30))
        errors.append(error if math.isfinite(error) else math.inf)
    return max(errors)


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    waits: Mapping[str, Callable[[Any], Any]] = {},
    repeats: int = 20,
    sample_seconds: float = 0.02,
    limit_seconds: float = 20.0,
) -> dict[str, list[float]]:
    """Time callables in turns, so that drift of the machine falls on all of them alike.

    Each round takes one sample of every callable; a sample is as many calls in a row as fill
    `sample_seconds`, dispatched without waiting in between. An untimed call goes before each
    sample: what a peer left behind (cold caches, a gigabyte of heap given back to the system) is
    not the callable's own cost. Every callable is run once before, to compile, and once more, to
    find how many calls fill a sample.

    Args:
      calls: name -> function without arguments, returning a pytree of arrays.
      waits: name -> function that waits for what the call returns; `jax.block_until_ready` for
        names that are not there.
      repeats: int, rounds at most; at least 3 are taken.
      sample_seconds: float, seconds that one sample should last.
      limit_seconds: float, seconds after which no further round starts.

    Returns:
      dict name -> seconds per call, one number per round.
    """
    calls_per_sample = {}
    for name, call in calls.items():
        wait = waits.get(name, jax.block_until_ready)
        wait(call())
        start = time.perf_counter()
        wait(call())
        once = time.perf_counter() - start
        calls_per_sample[name] = max(1, math.ceil(sample_seconds / max(once, 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for round_index in range(max(repeats, 3)):
        if round_index >= 3 and time.perf_counter() - began > limit_seconds:
            break
        for name, call in calls.items():
            wait = waits.get(name, jax.block_until_ready)
            wait(call())
            start = time.perf_counter()
            for _ in range(calls_per_sample[name]):
                result = call()
            wait(result)
            samples[name].append((time.perf_counter() - start) / calls_per_sample[name])
    return samples
