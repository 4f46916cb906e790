"""The shapes that sparsity may take, as frozen values that configs and masks share."""

import dataclasses


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
