"""What the attention benchmark measures: settings, block patterns, and which points come first."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.masks.attention.fixed import longformer, pattern_at_density

# On a GPU every point does the work of one layer of a large model.
_GPU_TOKENS = 16384
_GPU_WIDTH = 2048
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One setting of the op.

    Attributes:
      length: int, T = S, positions.
      density: float, share of the visible blocks that a pattern is to keep; `longformer` and
        `full` do not use it.
      pattern: see `make_pattern`; "full" has no mask to apply.
      batch: int, B.
      heads: int, N = K.
      head_dim: int, H.
      block: int, block_q = block_kv.
      backward: bool, whether the gradients of q, k, v are computed too.
      measure: "attention", or "schedule": the making of the block schedule, timed beside the
        attention that it serves.
    """

    length: int
    density: float = 0.11
    pattern: str = "random"
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    block: int = 64
    causal: bool = False
    backward: bool = True
    dtype: str = "float32"
    measure: Literal["attention", "schedule"] = "attention"

    def key(self) -> dict[str, Any]:
        """Return what the point is recorded under.

        Returns:
          dict of settings; `measure` only where it says something, so that records taken before
          there was a choice still match.
        """
        key = dataclasses.asdict(self)
        if self.measure == "attention":
            del key["measure"]
        return key

    def make_mask(self) -> jax.Array | None:
        """Return the block mask, or None if every block is kept.

        Returns:
          bool[1, 1, I, I] or None.
        """
        if self.pattern == "full":
            return None
        kept = make_pattern(
            self.pattern, self.length // self.block, density=self.density, causal=self.causal
        )
        return jnp.asarray(kept)[None, None]

    def kept_share(self) -> float:
        """Return the fraction of all logits that lie in kept blocks.

        Returns:
          float in [0, 1].
        """
        mask = self.make_mask()
        if mask is None:
            return (1 + self.block / self.length) / 2 if self.causal else 1.0
        return float(mask.mean())

    def flops(self) -> float:
        """Return the work in kept blocks.

        Two products forward, 4 B N H floating-point operations for each kept logit; five more
        backward, the logits computed again. A block on the diagonal of causal attention counts
        whole, for sparse and dense functions alike.

        Returns:
          float, floating-point operations of one call.
        """
        forward = 4 * self.batch * self.heads * self.length**2 * self.head_dim * self.kept_share()
        return forward * (3.5 if self.backward else 1.0)


def make_pattern(name: str, num_blocks: int, *, density: float, causal: bool) -> np.ndarray:
    """Make the block mask of one head; equal arguments give equal masks.

    random          each block kept with probability `density`; rows may be empty
    union           exactly round(density * blocks) random blocks, for comparisons of block sizes
    sliding_window  a band around the diagonal, exactly at `density`
    sink            the first column, and a narrower window that leaves the density as it is
    longformer      a window of three blocks and one global block, whatever `density` is
    strided         half the density in a window, half in every n-th diagonal
    spion           uneven, as found by flood filling: a band, vertical lines and dense rows, a
                    third of the density each

    Args:
      name: one of the names above.
      num_blocks: int, I, blocks per side.
      density: float, share of the visible blocks; "strided" and "spion" come near it.
      causal: bool, whether blocks above the diagonal are dropped.

    Returns:
      bool[I, I], True where a block is kept.

    Raises:
      ValueError: if the pattern is unknown.
    """
    rows, columns = np.indices((num_blocks, num_blocks))
    distance = np.abs(rows - columns)
    if name == "random":
        kept = np.random.default_rng(0).random((num_blocks, num_blocks)) < density
    elif name == "union":
        count = round(density * num_blocks**2)
        kept = np.random.default_rng(0).permutation(num_blocks**2) < count
        kept = kept.reshape(num_blocks, num_blocks)
    elif name == "sliding_window":
        kept = pattern_at_density("sliding_window", num_blocks, density=density, causal=causal)
    elif name == "sink":
        rest = density - 1 / num_blocks
        kept = pattern_at_density("sliding_window", num_blocks, density=rest, causal=causal)
        kept = kept | (columns == 0)
    elif name == "longformer":
        kept = longformer(num_blocks, width=2, num_global=1, causal=causal)
    elif name == "strided":
        stride = max(2, round(2 / density))
        kept = (distance < _half_width(density / 2, num_blocks)) | (distance % stride == 0)
    elif name == "spion":
        lines = max(1, round(density / 3 * num_blocks))
        at = ((np.arange(lines) + 0.5) * num_blocks / lines).astype(int)
        kept = distance < _half_width(density / 3, num_blocks)
        kept[:, at] = True
        kept[at, :] = True
    else:
        known = "random, union, sliding_window, sink, longformer, strided, spion or full"
        raise ValueError(f"pattern must be {known}, got {name!r}")
    return np.tril(kept) if causal else np.asarray(kept)


def _half_width(density: float, num_blocks: int) -> int:
    return max(1, round((density * num_blocks + 1) / 2))


def _gpu_problem(length: int, head_dim: int = 128, block: int = 128, **changes: Any) -> Problem:
    """A problem that fills a GPU, in 16 bits."""
    if changes.get("density") == 1.0:
        changes["pattern"] = "full"
    return Problem(
        length=length,
        batch=max(1, _GPU_TOKENS // length),
        heads=_GPU_WIDTH // head_dim,
        head_dim=head_dim,
        block=block,
        dtype="bfloat16",
        **changes,
    )


def _gpu_headline() -> list[Problem]:
    first = [
        _gpu_problem(4096, block=block, density=density, backward=backward)
        for density, block in ((0.1, 128), (0.1, 64), (1.0, 128), (0.6, 128), (0.2, 128))
        for backward in (False, True)
    ]
    longer = [
        _gpu_problem(8192, block=block, density=density, backward=backward)
        for density, block in ((0.1, 128), (0.1, 64), (0.6, 128))
        for backward in (False, True)
    ]
    return [
        *first,
        _gpu_problem(8192, density=0.1, measure="schedule"),
        *longer,
        _gpu_problem(4096, density=0.1, causal=True),
        _gpu_problem(4096, density=1.0, causal=True),
        _gpu_problem(4096, density=0.1, pattern="spion"),
        _gpu_problem(4096, density=0.125, pattern="union", block=32),
        _gpu_problem(4096, density=0.125, pattern="union", block=64),
        _gpu_problem(8192, density=1.0),
        _gpu_problem(4096, density=0.6, block=64),
        _gpu_problem(4096, density=0.1, head_dim=64),
    ]


def _gpu_sweep() -> list[Problem]:
    densities = [
        _gpu_problem(4096, block=block, density=density, backward=backward)
        for density in (*DENSITIES, 1.0)
        for block in (128, 64)
        for backward in (True, False)
    ]
    patterns = [
        _gpu_problem(4096, block=block, density=0.1, pattern=pattern, causal=causal)
        for pattern in ("sliding_window", "longformer", "strided", "spion")
        for block in (128, 64)
        for causal in (False, True)
    ]
    lengths = [
        _gpu_problem(
            length, head_dim, density=density, causal=causal, backward=backward, block=block
        )
        for length in (1024, 2048, 4096, 8192, 16384, 32768)
        for head_dim in (128, 64)
        for block in (128, 64)
        for density in (*DENSITIES, 1.0)
        for causal in (False, True)
        for backward in (True, False)
        # Below one block a row on average, most rows are empty and there is nothing to learn.
        if density * length >= block
    ]
    return [*densities, *patterns, *lengths]


def headline_problems(platform: str) -> list[Problem]:
    """Return the points that tell most, the most important first.

    Args:
      platform: str, JAX's name of the platform that will be measured.

    Returns:
      list of Problem, none twice.
    """
    if platform != "cpu":
        return _gpu_headline()
    training = Problem(length=2048, batch=4, head_dim=32, causal=True, density=0.25)
    by_density = [
        Problem(length=4096, pattern=pattern, density=density, backward=backward)
        for pattern, density in (
            ("random", 0.11),
            ("full", 1.0),
            ("random", 0.05),
            ("random", 0.2),
            ("random", 0.4),
        )
        for backward in (True, False)
    ]
    return [
        *by_density,
        Problem(length=4096, pattern="longformer"),
        training,
        dataclasses.replace(training, pattern="full", density=1.0),
        Problem(length=2048, block=32),
        Problem(length=8192),
    ]


def sweep_problems(platform: str) -> list[Problem]:
    """Return the headline points and all that lie behind them.

    Args:
      platform: str, JAX's name of the platform that will be measured.

    Returns:
      list of Problem, none twice.
    """
    if platform != "cpu":
        return list(dict.fromkeys([*_gpu_headline(), *_gpu_sweep()]))
    sweep = [
        Problem(length=length, density=density)
        for length in (1024, 2048, 4096)
        for density in (0.05, 0.2, 0.4, 0.7)
    ]
    # A full list beside short ones: the two patterns of a pair keep nearly as many blocks.
    long_lists = [
        Problem(length=length, density=0.1, block=block, pattern=pattern, backward=backward)
        for length in (2048, 4096)
        for block in (64, 32)
        for backward in (False, True)
        for pattern in ("sliding_window", "sink")
    ]
    return list(dict.fromkeys([*headline_problems(platform), *sweep, *long_lists]))
