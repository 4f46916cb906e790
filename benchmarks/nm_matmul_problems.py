"""What the benchmark of N:M products measures: settings, random inputs, and which come first.

Letters: M tokens   K contracted axis   N columns of the weight.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import pack_nm
from pallas_kernels.doctor.timing import make_random

type Measure = Literal["gemm", "gemm_with_packing", "dx", "dw", "pack", "ffn"]

# Operands of less would be found in the 50 to 60 MB of cache that a GPU has.
_RING_BYTES = 128 * 10**6
# One launch must not be most of what is timed: a call packs several weights.
_MIN_PACKED = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One setting that is measured.

    Attributes:
      measure: what is timed.
        "gemm", y = x w, packed beforehand; "gemm_with_packing", the same with packing.
        "dx", dx = dz w^T, packed beforehand, of a transposable mask.
        "dw", dw = x^T S(dz), with pruning and packing of dz if `grad_pruning` says so.
        "pack", packing along both axes.
        "ffn", a feed-forward block without biases, forward and backward, both weights packed.
      rows: int, M; of "pack", which has no tokens, 1.
      inner: int, K; of "ffn" the width of the model.
      columns: int, N; of "ffn" the width between its two products, without that of a gate.
      activation: of "ffn"; its first weight has 2 N columns if it is gated.
      grad_pruning: of "dw" and "ffn".
    """

    measure: Measure
    rows: int
    inner: int
    columns: int
    activation: Literal["gelu", "geglu", "swiglu"] | None = None
    grad_pruning: Literal["none", "mvue", "mvue_exact"] = "none"
    dtype: str = "bfloat16"

    def key(self) -> dict[str, Any]:
        """Return what the point is recorded under.

        Returns:
          dict of settings; options only where they say something.
        """
        key = dataclasses.asdict(self)
        return {name: value for name, value in key.items() if value not in (None, "none")}

    @property
    def up_columns(self) -> int:
        """Columns of the first weight of "ffn"."""
        return self.columns * (2 if self.activation in ("geglu", "swiglu") else 1)

    def flops(self) -> float | None:
        """Return the work of the dense products: rates of sparse ones are effective rates.

        Returns:
          float, floating-point operations, or None of "pack".
        """
        if self.measure == "pack":
            return None
        product = 2.0 * self.rows * self.inner * self.columns
        if self.measure == "ffn":
            return 3 * product * (1 + self.up_columns // self.columns)
        return product

    def packing_bytes(self) -> int:
        """Bytes that packing along both axes reads (w, mask) and writes (values, metadata)."""
        itemsize = jnp.dtype(self.dtype).itemsize
        entries = self.inner * self.columns
        return entries * (itemsize + 1) + 2 * (entries // 2 * itemsize + entries // 8)

    def count_sets(self) -> int:
        """Return how many sets of inputs one call works on, so that none is found in the cache.

        Returns:
          int, at most 24; 1 where one set exceeds the cache.
        """
        if self.measure == "ffn":
            return 1  # Between its products lie hundreds of megabytes.
        itemsize = jnp.dtype(self.dtype).itemsize
        m, k, n = self.rows, self.inner, self.columns
        moved = itemsize * (m * k + k * n + m * n)
        if self.measure == "pack":
            return max(_MIN_PACKED, math.ceil(_RING_BYTES / self.packing_bytes()))
        return min(24, math.ceil(_RING_BYTES / moved))


def make_transposable_mask(key: jax.Array, rows: int, columns: int) -> jax.Array:
    """Draw a mask that keeps two of every four along both axes, evenly over all such blocks.

    Args:
      key: key[].
      rows: int, multiple of 4.
      columns: int, multiple of 4.

    Returns:
      bool[rows, columns].
    """
    blocks = jnp.asarray(_list_blocks())
    grid = (rows // 4, columns // 4)
    chosen = blocks[jax.random.randint(key, grid, 0, len(blocks))]
    return chosen.transpose(0, 2, 1, 3).reshape(rows, columns)


@functools.cache
def _list_blocks() -> np.ndarray:
    """The 90 blocks of four by four that keep two in each row and column."""
    lines = [
        tuple(int(i in kept) for i in range(4)) for kept in itertools.combinations(range(4), 2)
    ]
    blocks = np.array(list(itertools.product(lines, repeat=4)), bool)
    return blocks[(blocks.sum(axis=1) == 2).all(axis=1)]


class Inputs(NamedTuple):
    """One set of inputs; None where a measure has no use for it.

    Attributes:
      x: [M, K].
      d_out: [M, N], or [M, K] of "ffn", the gradient of what the forward pass returns.
      w: [K, N] the weight, of "ffn" the first.
      mask: bool, shaped like w.
      w_down: [N, K], the second weight of "ffn".
      mask_down: bool, shaped like w_down.
      packed: PackedNM of w.
      key: key[] of gradient pruning.
      turned: [N, K], w^T, as our own dense kernel reads it.
    """

    x: Any = None
    d_out: Any = None
    w: Any = None
    mask: Any = None
    w_down: Any = None
    mask_down: Any = None
    packed: Any = None
    key: Any = None
    turned: Any = None


def make_inputs(
    problem: Problem, seed: jax.typing.ArrayLike, *, packs: bool, turns: bool = False
) -> Inputs:
    """Make random inputs; jit it, or `jax.eval_shape` it for their shapes.

    Args:
      seed: int, may be traced, so that one program makes all sets.
      packs: bool, whether what is measured takes a packed weight.
      turns: bool, whether it takes a turned one.

    Returns:
      Inputs; products are of order 1.
    """
    keys = jax.random.split(jax.random.key(seed), 5)
    k, m = problem.inner, problem.rows

    def draw(index, *shape):
        spec = jax.ShapeDtypeStruct(shape, problem.dtype)
        return make_random(spec, seed=8 * seed + index)

    def draw_weight(index, rows, columns):
        w = draw(index, rows, columns) * jnp.asarray(math.sqrt(2 / rows), problem.dtype)
        return w, make_transposable_mask(keys[index], rows, columns)

    w, mask = draw_weight(0, k, problem.up_columns)
    if problem.measure == "pack":
        return Inputs(w=w, mask=mask)
    inputs = Inputs(x=draw(1, m, k), w=w, mask=mask)
    if problem.grad_pruning != "none":
        inputs = inputs._replace(key=keys[4])
    if problem.measure == "ffn":
        w_down, mask_down = draw_weight(2, problem.columns, k)
        return inputs._replace(w_down=w_down, mask_down=mask_down, d_out=draw(3, m, k))
    if problem.measure in ("dx", "dw"):
        inputs = inputs._replace(d_out=draw(3, m, problem.columns))
    if packs and problem.measure in ("gemm", "dx"):
        axis = 0 if problem.measure == "gemm" else "both"
        inputs = inputs._replace(packed=pack_nm(w, mask, axis=axis, implementation="xla"))
    return inputs._replace(turned=w.T) if turns else inputs


class Block(NamedTuple):
    """The feed-forward block of a model.

    Attributes:
      width: int, of the model.
      hidden: int, between the two products.
    """

    name: str
    width: int
    hidden: int
    activation: Literal["gelu", "geglu", "swiglu"]

    def problem(
        self, *, tokens: int = 16384, grad_pruning: Literal["none", "mvue"] = "mvue"
    ) -> Problem:
        """Return the block as a setting."""
        return Problem(
            measure="ffn",
            rows=tokens,
            inner=self.width,
            columns=self.hidden,
            activation=self.activation,
            grad_pruning=grad_pruning,
        )


BLOCKS = (
    Block("GPT-2 124M", 768, 3072, "gelu"),
    Block("GPT-2 350M", 1024, 4096, "gelu"),
    Block("GPT-2 774M", 1280, 5120, "gelu"),
    Block("GPT-2 1558M", 1600, 6400, "gelu"),
    Block("width 2048", 2048, 8192, "gelu"),
    Block("Llama 4096/14336", 4096, 14336, "swiglu"),
)
"""Feed-forward blocks that are measured; the fifth is the narrowest that a target speaks of."""


def _cube(size: int, measure: Measure = "gemm", **options: Any) -> Problem:
    return Problem(measure=measure, rows=size, inner=size, columns=size, **options)


def _pack(inner: int, columns: int, dtype: str = "bfloat16") -> Problem:
    return Problem(measure="pack", rows=1, inner=inner, columns=columns, dtype=dtype)


def _gpu_headline() -> list[Problem]:
    *_, gpt2_1558m, wide, llama = (block.problem() for block in BLOCKS)
    return [
        _cube(4096),
        _pack(4096, 4096),
        llama,
        _cube(8192),
        wide,
        _cube(2048),
        _cube(1024),
        _cube(4096, "gemm_with_packing"),
        _cube(4096, "dx"),
        _cube(4096, "dw", grad_pruning="mvue"),
        gpt2_1558m,
        _cube(16384),
        BLOCKS[0].problem(),
        BLOCKS[-1].problem(grad_pruning="none"),
        BLOCKS[1].problem(),
        BLOCKS[2].problem(),
    ]


def _gpu_sweep() -> list[Problem]:
    sizes = (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
    measures: tuple[tuple[Measure, dict[str, Any]], ...] = (
        ("gemm", {}),
        ("gemm_with_packing", {}),
        ("dx", {}),
        ("dw", {"grad_pruning": "mvue"}),
    )
    cubes = [_cube(size, measure, **options) for size in sizes for measure, options in measures]
    # The products of the blocks by themselves, for the sizes from which on each of them wins.
    layers = [
        Problem(measure="gemm", rows=tokens, inner=inner, columns=columns)
        for block in BLOCKS
        for inner, columns in (
            (block.width, block.problem().up_columns),
            (block.hidden, block.width),
        )
        for tokens in (2048, 4096, 8192, 16384)
    ]
    packs = [_pack(size, size) for size in sizes]
    packs += [_pack(block.width, block.problem().up_columns) for block in BLOCKS]
    blocks = [
        block.problem(tokens=tokens, grad_pruning=grad_pruning)
        for block in BLOCKS
        for tokens in (4096, 16384)
        for grad_pruning in ("mvue", "none")
    ]
    half = [_cube(4096, dtype="float16"), _cube(8192, dtype="float16")]
    return [*cubes, *layers, *packs, *blocks, *half]


def _cpu_problems() -> list[Problem]:
    block = Block("small", 256, 1024, "gelu")
    blocks = [
        block.problem(tokens=1024, grad_pruning="none"),
        block.problem(tokens=1024),
        block._replace(hidden=704, activation="swiglu").problem(tokens=1024),
    ]
    problems = [
        _cube(512),
        _cube(1024),
        _cube(512, "dx"),
        _cube(512, "dw", grad_pruning="mvue"),
        *blocks,
    ]
    return [*(dataclasses.replace(p, dtype="float32") for p in problems), _pack(1024, 1024)]


def headline_problems(platform: str) -> list[Problem]:
    """Return the points that tell most, the most important first.

    Args:
      platform: str, JAX's name of the platform that will be measured.

    Returns:
      list of Problem, none twice.
    """
    return _cpu_problems() if platform == "cpu" else _gpu_headline()


def sweep_problems(platform: str) -> list[Problem]:
    """Return the headline points and all that lie behind them.

    Args:
      platform: str, JAX's name of the platform that will be measured.

    Returns:
      list of Problem, none twice.
    """
    if platform == "cpu":
        return _cpu_problems()
    return list(dict.fromkeys([*_gpu_headline(), *_gpu_sweep()]))
