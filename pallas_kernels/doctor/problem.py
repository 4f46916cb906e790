"""What a kernel is asked, and how the problems of an op are made."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

type Arrays = tuple[jax.Array, ...]
type Function = Callable[[Arrays, Any], tuple[Any, ...]]


class Tolerance(NamedTuple):
    """How a result that random draws decide is compared, entry by entry.

    Attributes:
      ulps: int, units in the last place that an entry may be off; NaN equals NaN.
      share: float, of the entries may be off by more: a rounding can turn a draw.
    """

    ulps: int
    share: float


class Problem(NamedTuple):
    """What a kernel is asked, and what it is compared with.

    Attributes:
      names: direction -> names of its results, in order of what the functions return.
      inputs: arrays in the dtype of the call.
      masks: name -> mask, or whatever else changes without a new compilation.
      call: (implementation, directions) -> function (inputs, mask) -> results of the directions.
      reference: function (inputs in f32, mask) -> all results.
      plain: function (inputs, mask) -> all results, in the dtype of the inputs; None: the kernel
        has to equal the reference to the bit.
      hide: function (inputs, mask) -> inputs with NaN where nothing may depend on them.
      drawn: names of results in which a rounding can turn a random draw: they are compared by
        their norms, since a few entries may differ much.
      tolerances: name -> Tolerance of results of draws that hardly any rounding turns; the
        reference returns these in the dtype of the call.
    """

    names: Mapping[str, tuple[str, ...]]
    inputs: Arrays
    masks: Mapping[str, Any]
    call: Callable[[str, tuple[str, ...]], Function]
    reference: Function
    plain: Function | None
    hide: Callable[[Arrays, Any], Arrays] = lambda inputs, mask: inputs
    drawn: tuple[str, ...] = ()
    tolerances: Mapping[str, Tolerance] = {}


class Maker(NamedTuple):
    """How the problems of one op are made.

    Attributes:
      facts: class of the op's static facts.
      make: (facts) -> Problem.
      shrink: (facts) -> facts of smaller calls of the same kind, the smallest first, and its own.
      draw_mask: (facts, density) -> mask of a call to be timed; None where no mask has a density.
      dense: (inputs) -> what takes the place of the op in a dense model; None where nothing does.
    """

    facts: type
    make: Callable[[Any], Problem]
    shrink: Callable[[Any], Iterator[Any]]
    draw_mask: Callable[[Any, float], Any] | None = None
    dense: Callable[[Any], Function] | None = None


def draw_blocks(shape: tuple[int, ...], density: float) -> jax.Array:
    """Draw a block mask.

    Args:
      shape: of the mask.
      density: expected fraction kept.

    Returns:
      bool array, True = kept.
    """
    return jnp.asarray(np.random.default_rng(3).random(shape) < density)
