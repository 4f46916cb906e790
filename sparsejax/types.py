"""Array and tree aliases, and the letters that name array axes.

Axis letters, used as upper-case suffixes of variable names (`q_BTNH`); a file that uses
others says so at its top:

  B batch         T query position   S key position   D model width   F feed-forward width
  N query heads   K key/value heads  H head dim       V vocabulary    L layers
  I query blocks  J key blocks

A mask is boolean and True means *kept*: the weight takes part, the position may be attended.
"""

from typing import Any

import jax

type Mask = jax.Array
"""bool array, True = kept."""

type PyTree = Any
"""Nested dicts of arrays, as `nnx.to_pure_dict` makes them."""
