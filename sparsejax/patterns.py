"""The shapes that sparsity may take, as frozen values that configs and masks share."""

import dataclasses
import re
from typing import NamedTuple, Protocol

import jax
import numpy as np

from sparsejax.types import PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPattern:
    """Attention kept or dropped in rectangles of `block_q` queries by `block_kv` keys.

    Attributes:
      block_q: int, queries per block.
      block_kv: int, keys per block.

    Raises:
      ValueError: if a block size is not positive.
    """

    block_q: int
    block_kv: int

    def __post_init__(self):
        for name in ("block_q", "block_kv"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {name}={value}")

    def grid(self, length: int) -> tuple[int, int]:
        """Return (I, J), the number of query and key blocks of a sequence.

        Args:
          length: int, positions; a multiple of both block sizes.

        Returns:
          tuple of two ints.

        Raises:
          ValueError: if a block size does not divide the length.
        """
        for name in ("block_q", "block_kv"):
            if length % getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} must divide the sequence length, "
                    f"got length={length}"
                )
        return length // self.block_q, length // self.block_kv


class BlockChooser(Protocol):
    """Choose the attention blocks of each input and each head from its queries and keys.

    Static, so a frozen value. B batch, T query and S key positions, N query heads, K key/value
    heads, H head dim, L layers, I query and J key blocks.
    """

    @property
    def lookahead(self) -> bool:
        """Whether a causal query block keeps what depends on positions behind its first.

        Such a choice cannot decode: when a token is decoded, what is behind it is not there yet.
        """
        ...

    def budget(self, num_blocks: int, num_heads: int, /) -> PyTree:
        """Return what a choice needs to know of its layer: arrays with a leading axis L, or 1."""
        ...

    def measure_density(self, num_blocks: int, num_heads: int, /) -> np.ndarray:
        """Return f64[L | 1], the share of the visible blocks that each layer keeps."""
        ...

    def __call__(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        kv_mask_BS: jax.Array | None,
        budget: PyTree,
        /,
    ) -> jax.Array:
        """Return bool[B, N, I, J], True = kept; `kv_mask_BS` is True of real tokens, None = all.

        `budget` is that of the layer, without the leading axis.
        """
        ...


class HeadMaps(NamedTuple):
    """What a probe measures where each head's map is pooled; a model adds a leading axis L.

    Attributes:
      mean_TS: f32[T, S], the attention map averaged over examples and heads.
      pooled: f32[N, ...], what `PoolMap` makes of each head's map, averaged over examples.
    """

    mean_TS: jax.Array
    pooled: jax.Array


class PoolMap(Protocol):
    """Make something small of the attention map of one head; static and linear."""

    def __call__(self, map_TS: jax.Array, /) -> jax.Array:
        """Return f32[...] of f32[T, S]."""
        ...


@dataclasses.dataclass(frozen=True)
class NMPattern:
    """Weights of which at most n of every m consecutive ones are kept.

    Groups run along the contracted axis, the first of a kernel [in, out]. Written "2:4", or
    "2:4 transposable".

    Attributes:
      n: int, weights kept.
      m: int, weights in a group.
      transposable: bool, groups along the other axis keep no more than n of m either, so that the
        product of the backward pass is as sparse as that of the forward pass.

    Raises:
      ValueError: unless 1 <= n <= m.

    Example:
      >>> str(NMPattern.parse("2:4 transposable"))
      '2:4 transposable'
    """

    n: int = 2
    m: int = 4
    transposable: bool = False

    def __post_init__(self):
        sizes = (self.n, self.m)
        is_sane = all(isinstance(x, int) and not isinstance(x, bool) for x in sizes)
        if not is_sane or not 1 <= self.n <= self.m:
            raise ValueError(f"n and m must be ints, 1 <= n <= m, got n={self.n!r}, m={self.m!r}")
        if not isinstance(self.transposable, bool):
            raise ValueError(f"transposable must be a bool, got {self.transposable!r}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" + " transposable" * self.transposable

    @classmethod
    def parse(cls, text: str) -> "NMPattern":
        """Read a pattern as `str` writes it.

        Args:
          text: str, "n:m" or "n:m transposable"; space around it is ignored.

        Raises:
          ValueError: if the text is anything else, or not 1 <= n <= m.
        """
        match = re.fullmatch(r"([0-9]+):([0-9]+)( +transposable)?", text.strip())
        if match is None:
            raise ValueError(f"a pattern must be like '2:4' or '2:4 transposable', got {text!r}")
        return cls(int(match[1]), int(match[2]), transposable=match[3] is not None)


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Weights of which any may be kept, in any number.

    Written "unstructured".

    Example:
      >>> str(Unstructured())
      'unstructured'
    """

    def __str__(self) -> str:
        return "unstructured"


@dataclasses.dataclass(frozen=True)
class WeightBlocks:
    """Weights kept or dropped in blocks of a kernel [in, out], or of an embedding [tokens, width].

    Written "ROWSxCOLUMNS".

    Attributes:
      rows: int, entries of a block along the first axis.
      columns: int, entries along the second.

    Raises:
      ValueError: if a side is not a positive int.

    Example:
      >>> WeightBlocks.parse("64x32")
      WeightBlocks(rows=64, columns=32)
    """

    rows: int
    columns: int

    def __post_init__(self):
        for name in ("rows", "columns"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {name}={value!r}")

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Return (I, J), the number of blocks along both axes of a weight.

        Args:
          shape: (K, N) of the weight; multiples of the sides.

        Returns:
          tuple of two ints.

        Raises:
          ValueError: if a side does not divide its axis.
        """
        if shape[0] % self.rows or shape[1] % self.columns:
            raise ValueError(f"blocks of {self} must divide the weight, got shape {list(shape)}")
        return shape[0] // self.rows, shape[1] // self.columns

    @classmethod
    def parse(cls, text: str) -> "WeightBlocks":
        """Read a pattern as `str` writes it.

        Args:
          text: str, "ROWSxCOLUMNS"; space around it is ignored.

        Raises:
          ValueError: if the text is anything else, or a side is 0.
        """
        match = re.fullmatch(r"([0-9]+)x([0-9]+)", text.strip())
        if match is None:
            raise ValueError(f"a pattern must be like '64x64', got {text!r}")
        return cls(int(match[1]), int(match[2]))


type WeightPattern = NMPattern | Unstructured | WeightBlocks
"""The shapes of a sparse weight."""


def parse_weight_pattern(text: str) -> WeightPattern:
    """Read the pattern of a sparse weight.

    Args:
      text: str, "n:m", "n:m transposable", "ROWSxCOLUMNS" or "unstructured"; space around it is
        ignored.

    Raises:
      ValueError: if the text is anything else, not 1 <= n <= m, or a side is 0.

    Example:
      >>> parse_weight_pattern("1:4")
      NMPattern(n=1, m=4, transposable=False)
    """
    if ":" in text:
        return NMPattern.parse(text)
    if text.strip() == "unstructured":
        return Unstructured()
    if re.fullmatch(r" *[0-9]+x[0-9]+ *", text):
        return WeightBlocks.parse(text)
    raise ValueError(
        f"a pattern must be like '2:4', '2:4 transposable', '64x64' or 'unstructured', got {text!r}"
    )


def parse_pattern_list(text: str, name: str) -> tuple[tuple[str, WeightPattern], ...]:
    """Read which weights have which pattern; of several entries that match, the first counts.

    Args:
      text: "regex=pattern; regex=pattern", patterns as `parse_weight_pattern` takes them; empty for
        none.
      name: what a message calls the text.

    Raises:
      ValueError: if the text is anything else.

    Example:
      >>> parse_pattern_list("mlp/.*=2:4", "sparse_weights")
      (('mlp/.*', NMPattern(n=2, m=4, transposable=False)),)
    """
    pairs = []
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        regex, equals, pattern = entry.rpartition("=")
        if equals != "=" or not regex:
            raise ValueError(f"{name} must be 'regex=pattern; regex=pattern', got {text!r}")
        try:
            re.compile(regex)
            pairs.append((regex.strip(), parse_weight_pattern(pattern)))
        except (ValueError, re.error) as error:
            raise ValueError(f"{name}: {entry!r}: {error}") from error
    return tuple(pairs)
