"""One density and one size of blocks: how a pretrained model reads documents through each pattern.

Legend: L layers, T positions, N query heads, I = J blocks along one side.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.pretrained_documents import Document
from benchmarks.pretrained_patterns import (
    CHOSEN,
    Maps,
    average_maps,
    make_chooser,
    make_masks,
    make_oracles,
)
from sparsejax.masks import block_density
from sparsejax.models import AttentionOptions, SparsityMask, Transformer

DENSE = "dense"


class Reading(NamedTuple):
    """One document, ready to be read through one pattern.

    Attributes:
      compute: jitted function without arguments -> f32[T - 1], the loss of every token but the
        first, nats.
      kept: float, density of the pattern.
      share: float, how much of the dense attention falls on what it keeps; None if the model
        chooses the blocks itself.
    """

    compute: Callable[[], jax.Array]
    kept: float
    share: float | None


class Setting:
    """The patterns of one density and block size.

    Attributes:
      model: with blocks of that size.
      documents: those for calibration and those for tests.
      block_size: int, side of a block, positions.
      density: float, share of the visible blocks that is kept.
      tests: list of int, the documents that are read.
    """

    def __init__(
        self,
        model: Transformer,
        documents: Sequence[Document],
        get_maps: Callable[[int], Maps],
        *,
        block_size: int,
        density: float,
    ):
        """Measure nothing yet.

        Args:
          get_maps: function of a document's number to its dense maps, which settings share.
        """
        self.model, self.documents, self._get_maps = model, documents, get_maps
        self.block_size, self.density = block_size, density
        self.tests = [i for i, document in enumerate(documents) if document.use == "test"]
        self._calibrations = [i for i, d in enumerate(documents) if d.use == "calibration"]
        self._params = nnx.state(model, nnx.Param)
        self._sizes = {"density": density, "block_size": block_size}

    def prepare(self, pattern: str, index: int) -> Reading:
        """Prepare a document to be read through a pattern.

        Args:
          pattern: `DENSE` or one of `PATTERNS`.
          index: int, of the document.
        """
        ids_T = self.documents[index].ids_T
        if pattern == DENSE:
            return Reading(lambda: self._dense(self._params, None, ids_T), 1.0, 1.0)
        if pattern in CHOSEN:
            chooser, compute = self._chosen[pattern]
            config = self.model.config
            kept = chooser.measure_density(config.block.grid(len(ids_T))[0], config.num_heads)
            return Reading(lambda: compute(self._params, None, ids_T), float(kept.mean()), None)
        kept_LNIJ = self._get_mask(pattern, index)
        blocks_LNIJ = self._get_maps(index).blocks_LNIJ
        on_device = jnp.asarray(kept_LNIJ)
        return Reading(
            lambda: self._sparse(self._params, on_device, ids_T),
            float(block_density(on_device, causal=True).mean()),
            float((blocks_LNIJ * kept_LNIJ).sum(-1).mean()),
        )

    @functools.cached_property
    def _dense(self):
        return _make_loss(self.model, AttentionOptions(sparse=False))

    @functools.cached_property
    def _sparse(self):
        return _make_loss(self.model, AttentionOptions())

    @functools.cached_property
    def _chosen(self):
        ids_BT = np.stack([self.documents[i].ids_T for i in self._calibrations])

        def make(name):
            chooser = make_chooser(name, self.model, ids_BT, **self._sizes)
            return chooser, _make_loss(self.model, AttentionOptions(choose_blocks=chooser))

        return _Lazily(make)

    @functools.cached_property
    def _fixed(self):
        calibration = average_maps([self._get_maps(i) for i in self._calibrations])
        return make_masks(calibration, **self._sizes)

    @functools.cached_property
    def _oracles(self):
        return _Lazily(lambda index: make_oracles(self._get_maps(index), density=self.density))

    def _get_mask(self, pattern, index):
        return self._fixed[pattern] if pattern in self._fixed else self._oracles[index][pattern]


class _Lazily(dict):
    """A dict that makes what it lacks from the key."""

    def __init__(self, make: Callable[[Any], Any]):
        super().__init__()
        self._make = make

    def __missing__(self, key: Any) -> Any:
        self[key] = self._make(key)
        return self[key]


def _make_loss(model, options):
    """Return the jitted function of params, masks bool[L, 1 | N, I, J] or None, and ids i32[T]."""
    graphdef, _, masks = nnx.split(model, nnx.Param, SparsityMask)
    plain = nnx.to_pure_dict(masks)

    @jax.jit
    def compute(params, masks_LNIJ, ids_T):
        masks = plain
        if masks_LNIJ is not None:
            attention = plain["blocks"]["attention"] | {"block_mask": masks_LNIJ[:, None]}
            masks = plain | {"blocks": plain["blocks"] | {"attention": attention}}
        merged = nnx.merge(graphdef, params, masks)
        logits_TV = merged(ids_T[None], attention_options=options).logits[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits_TV[:-1], ids_T[1:])

    return compute
