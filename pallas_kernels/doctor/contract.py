"""Whether a kernel is right: values and gradients beside the reference, and the same bits twice.

A result may err as far as a plain program in the same dtype, times 2 for values and 3 for
gradients. Masks are random with several steps of every loop, and with empty rows and columns.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.doctor.oracles import error
from pallas_kernels.doctor.problem import Function, Problem

_FACTORS = {"forward": 2.0, "gradient": 3.0}
# Of the norm of a gradient that was pruned by random draws: f32 turns a draw now and then as well.
_DRAWN_SHARE = 0.02


class Finding(NamedTuple):
    """What was found out about one direction.

    Attributes:
      off: name of the result that is farthest from its bound.
      mask: name of the mask it was found with.
      error: largest absolute difference from the reference, infinite if one is not finite; for
        what is drawn its norm, or the share of entries that are off where the problem tolerates
        some.
      allowed: what it may be.
      differs: name of a result whose bits a second run changed; "" if there is none.
    """

    off: str
    mask: str
    error: float
    allowed: float
    differs: str


def check_contract(
    problem: Problem, implementation: str | Function, directions: tuple[str, ...]
) -> dict[str, Finding]:
    """Run a backend on every mask of a problem and compare it with the reference.

    Args:
      problem: what it is asked.
      implementation: name of the backend, or a function that stands for `problem.call` of it.
      directions: to be checked: all of the problem, or the first; what a function returns.

    Returns:
      direction -> Finding.

    Raises:
      NotImplementedError: if the backend does not do this, with the reason.
    """
    if isinstance(implementation, str):
        implementation = problem.call(implementation, directions)
    kernel = _compile(implementation)
    reference = _compile(problem.reference)
    plain = None if problem.plain is None else _compile(problem.plain)
    wide = tuple(x.astype(jnp.float32) for x in problem.inputs)
    names = [(d, name) for d in problem.names for name in problem.names[d]]
    findings: dict[str, Finding] = {}
    for mask_name, mask in problem.masks.items():
        inputs = problem.hide(problem.inputs, mask)
        results = kernel(inputs, mask)
        repeated = kernel(inputs, mask)
        exact = reference(wide, mask)
        is_low = problem.inputs[0].dtype != jnp.float32
        rough = plain(problem.inputs, mask) if plain is not None and is_low else exact
        for place, (direction, name) in enumerate(names[: len(results)]):
            got, expected = results[place], exact[place]
            if name in problem.tolerances:
                ulps, allowed = problem.tolerances[name]
                measure = functools.partial(_share_off, ulps=ulps)
            else:
                measure = _norm_error if name in problem.drawn else error
                allowed = _FACTORS[direction] * measure(rough[place], expected)
                if name in problem.drawn:
                    allowed += _DRAWN_SHARE * _norm(expected)
                elif problem.plain is not None:
                    allowed += 1e-5 + 2e-6 * _largest(expected)
            found = Finding(
                off=name,
                mask=mask_name,
                error=measure(got, expected) if got.shape == expected.shape else np.inf,
                allowed=allowed,
                differs="" if _same_bits(got, repeated[place]) else name,
            )
            findings[direction] = _worse(findings.get(direction), found)
    return findings


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    @jax.jit
    def run(inputs, mask):
        # GPUs would otherwise round f32 operands to TF32.
        with jax.default_matmul_precision("highest"):
            return function(inputs, mask)

    # A kernel that is interpreted calls JAX itself, and may wait forever for what comes next.
    return lambda *args: jax.block_until_ready(run(*args))


def _norm(x: Any) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def _norm_error(got: jax.Array, expected: jax.Array) -> float:
    off = _norm(np.asarray(got, np.float64) - np.asarray(expected, np.float64))
    return off if np.isfinite(off) else np.inf


def _share_off(got: jax.Array, expected: jax.Array, *, ulps: int) -> float:
    a, b = _count_ulps(got), _count_ulps(expected)
    is_off = (np.abs(a - b) > ulps) & ~(np.isnan(got) & np.isnan(expected))
    return float(is_off.mean()) if got.dtype == expected.dtype else np.inf


def _count_ulps(x: jax.Array) -> np.ndarray:
    """Number the values of a dtype in their order; both zeros have the same number."""
    values = np.asarray(x)
    if values.dtype == np.bool_:
        return values.astype(np.int64)
    bits = values.view(f"i{values.dtype.itemsize}").astype(np.int64)
    lowest = -(2 ** (8 * values.dtype.itemsize - 1))
    return np.where(bits < 0, lowest - bits, bits)


def _largest(x: jax.Array) -> float:
    values = np.abs(np.asarray(x, np.float64))
    return float(values[np.isfinite(values)].max(initial=0.0))


def _same_bits(a: jax.Array, b: jax.Array) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _worse(before: Finding | None, found: Finding) -> Finding:
    if before is None:
        return found
    worst = max(before, found, key=_share)
    return worst._replace(differs=before.differs or found.differs)


def _share(finding: Finding) -> float:
    return finding.error / finding.allowed if finding.allowed else finding.error
