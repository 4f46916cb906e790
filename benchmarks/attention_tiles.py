"""What limits block-sparse attention on a CPU, and which tiles of lists are fastest there?

    python -m benchmarks.attention_tiles [--headline] [--force] [--budget-seconds=N]

The "xla" form with several tiles of lists, and with blocks joined to large tiles ("joined"), beside
what its steps consist of: with no softmax between the two products ("products"), and with
exponentials but neither maximum, sum, nor mask ("exponentials"). Both walk the same lists in the
same tiles as the first. One large product of 2048 x 2048 x 2048 says what rate
the machine reaches at all.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, Point, parse_arguments, run_points
from benchmarks.records import Column
from pallas_kernels import block_lists, block_sparse_attention
from pallas_kernels.block_sparse_attention.xla import attention
from pallas_kernels.doctor.timing import make_random

_LENGTH, _HEADS, _HEAD_DIM, _LARGE = 4096, 4, 64, 2048
_TILE_NOW = "8 x 128"
# Lists of a tile by positions of a step, and most blocks of a step.
_TILES = {
    "4 x 128": (4, 128, 4),
    "8 x 128": (8, 128, 4),
    "16 x 128": (16, 128, 4),
    "8 x 64": (8, 64, 4),
    "4 x 256": (4, 256, 4),
    "8 x 256": (8, 256, 4),
    "8 x 512": (8, 512, 8),
}
# What stands between the two products.
_PARTS = {"products": lambda s: s, "exponentials": jnp.exp}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One setting that is measured: 4,096 positions, four heads of 64, float32.

    Attributes:
      block: int, side of a block, positions.
      pattern: "random", with lists of one length, or "global": a window of three blocks, and the
        first row and column.
      density: float, blocks kept of all; 0 where the pattern says it.
      backward: bool, with gradients.
    """

    block: int
    pattern: str
    density: float
    backward: bool

    def make_mask(self) -> jax.Array:
        """Draw the mask.

        Returns:
          bool[1, 1, I, I].
        """
        blocks = _LENGTH // self.block
        rows, columns = np.indices((blocks, blocks))
        if self.pattern == "global":
            mask = (abs(rows - columns) <= 1) | (rows == 0) | (columns == 0)
        else:
            order = np.random.default_rng(0).random((blocks, blocks)).argsort(axis=1)
            mask = order < round(self.density * blocks)
        return jnp.asarray(mask[None, None])


class Inputs(NamedTuple):
    """What every function is called with.

    Attributes:
      q: f32[1, T, N, H], divided by the square root of H.
      k: f32[1, T, N, H].
      v: f32[1, T, N, H].
      d_out: f32[1, T, N, H].
      mask: bool[1, 1, I, I].
      large: f32[2048, 2048].
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    mask: jax.Array
    large: jax.Array


def _attend(s: Inputs, *, problem: Problem, tile: Sequence[int] | None):
    """Attend with tiles of lists, or with joined blocks for (), or as the reference for None."""

    def attend(q, k, v):
        return block_sparse_attention(
            q,
            k,
            v,
            s.mask,
            block_q=problem.block,
            block_kv=problem.block,
            scale=1.0,
            implementation="reference" if tile is None else "xla",
        )

    def run():
        if not problem.backward:
            return attend(s.q, s.k, s.v)
        out, pull_back = jax.vjp(attend, s.q, s.k, s.v)
        return out, pull_back(s.d_out)

    if tile is None:
        return run()

    def choose(_, by_blocks, by_tiles, *operands):
        return (by_blocks if tile else by_tiles)(*operands)

    names = ("_LISTS_PER_TILE", "_POSITIONS_PER_STEP", "_BLOCKS_PER_STEP")
    constants = dict(zip(names, tile or _TILES[_TILE_NOW], strict=True))
    # Read while tracing.
    with (
        mock.patch.object(attention, "choose_cheaper", choose),
        mock.patch.multiple(block_lists, **constants),
    ):
        return run()


def _walk_part(s: Inputs, *, block: int, weigh: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Walk lists of whole steps as the forward pass does, with a part of its work."""

    def fold(x):
        return x[0].transpose(1, 0, 2).reshape(_HEADS, -1, block, _HEAD_DIM)

    q, k, v = fold(s.q), fold(s.k), fold(s.v)
    counts, visited = block_lists.list_kept(s.mask[0, 0])
    tiles = block_lists.make_tiles(counts, visited, block=block, parallel=False)

    def advance(_, total, tile):
        own = q[:, tile.owner]

        def step(index, total):
            visited_RW, _ = tile.walk(index, block)
            keys, values = (block_lists.gather_blocks(x, visited_RW) for x in (k, v))
            p = weigh(jnp.einsum("xrqh,xrch->xrqc", own, keys))
            return total + jnp.einsum("xrqc,xrch->xrqh", p, values)

        return None, jax.lax.fori_loop(0, tile.num_steps, step, total)

    def walk(_, tile):
        start = jnp.zeros((_HEADS, tile.owner.shape[0], block, _HEAD_DIM))
        _, total = block_lists.walk_lists(advance, None, start, tile)
        return None, (total,)

    _, (total,) = block_lists.walk_tiles(walk, None, tiles)
    return total.reshape(_HEADS, _LENGTH, _HEAD_DIM)


def _compute_part(s: Inputs, *, weigh: Callable[[jax.Array], jax.Array], block: int) -> jax.Array:
    """What `_walk_part` must equal."""
    q, k, v = (x[0].transpose(1, 0, 2) for x in (s.q, s.k, s.v))
    mask = s.mask[0].repeat(block, 1).repeat(block, 2)
    with jax.default_matmul_precision("highest"):
        logits = jnp.einsum("ntc,nsc->nts", q, k)
        return jnp.einsum("nts,nsc->ntc", jnp.where(mask, weigh(logits), 0), v)


def make_case(problem: Problem) -> Case:
    """Make the functions that one point compares.

    Args:
      problem: the setting.
    """
    shape = jax.ShapeDtypeStruct((1, _LENGTH, _HEADS, _HEAD_DIM), "float32")
    q, k, v, d_out = (make_random(shape, seed=seed) for seed in range(4))
    large = make_random(jax.ShapeDtypeStruct((_LARGE, _LARGE), "float32"), seed=4)
    mask = problem.make_mask()
    functions: dict[str, Callable[..., Any]] = {
        name: functools.partial(_attend, problem=problem, tile=tile)
        for name, tile in (_TILES | {"joined": ()}).items()
    }
    # Two products forward, and seven with gradients, for logits are computed twice.
    products = 7 if problem.backward else 2
    work = products * 2 * _HEADS * _HEAD_DIM * int(mask.sum()) * problem.block**2
    flops = dict.fromkeys(functions, work)
    references = {}
    if not problem.backward and problem.pattern == "random":
        for name, weigh in _PARTS.items():
            part = {"block": problem.block, "weigh": weigh}
            functions[name] = functools.partial(_walk_part, **part)
            references[name] = functools.partial(_compute_part, **part)
            flops[name] = work
        functions["large product"] = references["large product"] = lambda s: s.large @ s.large
        flops["large product"] = 2 * _LARGE**3
    wrapped = {name: lambda *s, f=f: f(Inputs(*s)) for name, f in functions.items()}
    reference = functools.partial(_attend, problem=problem, tile=None)
    return Case(
        functions=wrapped,
        args=Inputs(q / _HEAD_DIM**0.5, k, v, d_out, mask, large),
        reference=lambda *s: reference(Inputs(*s)),
        references={name: lambda *s, f=f: f(Inputs(*s)) for name, f in references.items()},
        tolerance=1e-3,
        flops=flops,
    )


def list_problems() -> list[Problem]:
    """Return the points: blocks of 64 first, forward before forward and backward."""
    patterns = (("random", 1.0), ("random", 0.25), ("random", 0.0625), ("global", 0.0))
    return [
        Problem(block=block, pattern=pattern, density=density, backward=backward)
        for block in (64, 32)
        for pattern, density in patterns
        for backward in (False, True)
    ]


def _milliseconds(name: str) -> Callable[[Any], str]:
    return lambda record: f"{1e3 * record['values'][name]['median_seconds']:.1f}"


def _gflops(name: str) -> Callable[[Any], str]:
    return lambda record: f"{1e3 * record['values'][name]['tflops_per_second']:.0f}"


def _pattern(record) -> str:
    key = record["key"]
    return f"random, {key['density']:g}" if key["pattern"] == "random" else key["pattern"]


COLUMNS = (
    Column("block", lambda r: str(r["key"]["block"])),
    Column("pattern", _pattern),
    Column("pass", lambda r: "forward + backward" if r["key"]["backward"] else "forward"),
    *(Column(f"{name} ms", _milliseconds(name)) for name in (*_TILES, "joined", *_PARTS)),
    Column(f"{_TILE_NOW} GFLOP/s", _gflops(_TILE_NOW)),
    *(Column(f"{name} GFLOP/s", _gflops(name)) for name in (*_PARTS, "large product")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the points that are missing, write and print the table.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if every function agreed with its reference.
    """
    parsed = vars(parse_arguments((__doc__ or "").splitlines()[0], arguments))
    problems = [p for p in list_problems() if not (parsed["headline"] and p.block == 32)]
    del parsed["headline"]
    points = [
        Point(key=dataclasses.asdict(p), make_case=functools.partial(make_case, p))
        for p in problems
    ]
    return 1 if run_points("attention_tiles", points, COLUMNS, limit_seconds=5.0, **parsed) else 0


if __name__ == "__main__":
    sys.exit(main())
