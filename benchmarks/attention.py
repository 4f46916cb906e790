"""How fast is block-sparse attention beside dense attention, per density, pattern and length?

    python -m benchmarks.attention [--headline] [--force] [--budget-seconds=N]

Every function of a point computes the same masked attention and is checked against the dense
implementation. A point with the pattern "full" has no mask to apply: it shows what the fastest
plain dense attention costs at its length, the number to hold the others against.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, Point, make_random, parse_arguments, run_points
from benchmarks.records import Column
from pallas_kernels import block_sparse_attention, make_block_schedule
from sparsejax.masks.block_patterns import longformer

# Dense attention keeps several arrays of all logits; beyond this many bytes for one of them a
# 16 GB machine no longer holds a forward and backward pass.
MAX_LOGITS_BYTES = 1 << 29


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One setting of the op.

    Attributes:
      length: int, T = S, positions.
      density: float, fraction of the visible blocks that "random" keeps; other patterns do not
        use it.
      pattern: "random", "longformer" (one global block, window of three) or "full".
      batch: int, B.
      heads: int, N = K.
      head_dim: int, H.
      block: int, block_q = block_kv.
      causal: bool.
      backward: bool, whether the gradients of q, k, v are computed too.
      dtype: str.
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

    def make_mask(self) -> jax.Array | None:
        """Return the block mask, or None if every block is kept.

        Returns:
          bool[1, 1, I, I] or None.

        Raises:
          ValueError: if the pattern is unknown.
        """
        num_blocks = self.length // self.block
        if self.pattern == "full":
            return None
        if self.pattern == "longformer":
            return longformer(num_blocks, width=2, num_global=1, causal=self.causal)[None, None]
        if self.pattern != "random":
            raise ValueError(f"pattern must be random, longformer or full, got {self.pattern!r}")
        mask = np.random.default_rng(0).random((num_blocks, num_blocks)) < self.density
        return jnp.asarray(np.tril(mask) if self.causal else mask)[None, None]

    def kept_share(self) -> float:
        """Return the fraction of all logits that lie in kept blocks.

        Returns:
          float in [0, 1].
        """
        mask = self.make_mask()
        if mask is None:
            return (1 + self.block / self.length) / 2 if self.causal else 1.0
        return float(mask.mean())


def headline_problems() -> list[Problem]:
    """Return the points that tell most, the most important first.

    Returns:
      list of Problem.
    """
    training = Problem(length=2048, batch=4, head_dim=32, causal=True, density=0.25)
    problems = [
        Problem(length=4096),
        Problem(length=4096, pattern="full", density=1.0),
        Problem(length=4096, backward=False),
        Problem(length=4096, pattern="longformer"),
        training,
        dataclasses.replace(training, pattern="full", density=1.0),
        Problem(length=2048, block=32),
        Problem(length=8192),
    ]
    if jax.devices()[0].platform == "cpu":
        return problems
    return [*problems, *(dataclasses.replace(p, dtype="bfloat16") for p in problems)]


def sweep_problems() -> list[Problem]:
    """Return the headline points and the density sweep behind them.

    Returns:
      list of Problem.
    """
    sweep = [
        Problem(length=length, density=density)
        for length in (1024, 2048, 4096)
        for density in (0.05, 0.2, 0.4, 0.7)
    ]
    return [*headline_problems(), *sweep]


def _attention_by_hand(q, k, v, mask, problem):
    """softmax(Q K^T) V as one writes it down, masked where there is a mask."""
    s = jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(problem.head_dim)
    attended = _attended(mask, problem)
    if attended is not None:
        s = jnp.where(attended, s, -jnp.inf)
    some = True if attended is None else attended.any(axis=-1, keepdims=True)
    p = jax.nn.softmax(jnp.where(some, s, 0.0), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", jnp.where(some, p, 0.0), v)


def _jax_attention(
    q, k, v, mask, problem, implementation: Literal["xla", "cudnn"] = "xla"
) -> jax.Array:
    attended = None if mask is None else _attended(mask, problem)
    causal = problem.causal and mask is None
    out = jax.nn.dot_product_attention(
        q, k, v, mask=attended, is_causal=causal, implementation=implementation
    )
    if attended is None:
        return out
    return jnp.where(attended.any(axis=-1).swapaxes(1, 2)[..., None], out, 0)


def _attended(mask, problem):
    attended = None
    if mask is not None:
        attended = jnp.repeat(jnp.repeat(mask, problem.block, axis=2), problem.block, axis=3)
    if problem.causal:
        triangle = jnp.tri(problem.length, dtype=bool)[None, None]
        attended = triangle if attended is None else attended & triangle
    return attended


def _op(q, k, v, mask, problem, implementation):
    return block_sparse_attention(
        q,
        k,
        v,
        mask if mask is None else make_block_schedule(mask),
        block_q=problem.block,
        block_kv=problem.block,
        causal=problem.causal,
        implementation=implementation,
    )


def _timed(attention, problem):
    """Function of (q, k, v, d_out, mask) that is timed: attention, and gradients if asked."""

    def forward(q, k, v, d_out, mask):
        return attention(q, k, v, mask, problem)

    def forward_and_backward(q, k, v, d_out, mask):
        out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, mask, problem), q, k, v)
        return out, vjp(d_out)

    return forward_and_backward if problem.backward else forward


def make_case(problem: Problem) -> Case:
    """Make the functions that one point compares.

    Args:
      problem: the setting.

    Returns:
      Case; the dense peers are absent where one array of logits is too large for a CPU.
    """
    peers = {"hand-written": _attention_by_hand, "jax.nn": _jax_attention}
    on_cpu = jax.devices()[0].platform == "cpu"
    if not on_cpu and problem.dtype == "bfloat16" and problem.pattern == "full":
        peers["cudnn"] = functools.partial(_jax_attention, implementation="cudnn")
    sparse = functools.partial(_op, implementation="xla")
    reference = functools.partial(_op, implementation="dense")
    absent = {}
    if on_cpu and 4 * problem.batch * problem.heads * problem.length**2 > MAX_LOGITS_BYTES:
        absent = dict.fromkeys(peers, "its logits do not fit the machine")
        peers, reference = {}, sparse
    shape = (problem.batch, problem.length, problem.heads, problem.head_dim)
    arrays = make_random((jax.ShapeDtypeStruct(shape, problem.dtype),) * 4)
    one_product = 2 * problem.batch * problem.heads * problem.length**2 * problem.head_dim
    # Two products forward; five backward, the logits computed again.
    flops = one_product * problem.kept_share() * (7 if problem.backward else 2)
    return Case(
        functions={name: _timed(f, problem) for name, f in {"xla": sparse, **peers}.items()},
        args=(*arrays, problem.make_mask()),
        reference=_timed(reference, problem),
        tolerance=2e-2 if problem.dtype == "bfloat16" else 1e-3,
        flops={"xla": flops},
        absent=absent,
    )


def _milliseconds(name):
    return lambda record: f"{1e3 * record['values'][name]['median_seconds']:.1f}"


def _megabytes(name):
    return lambda record: f"{record['values'][name]['temp_bytes'] / 1e6:.0f}"


def _speedup(record):
    seconds = {
        name: value["median_seconds"]
        for name, value in record["values"].items()
        if "median_seconds" in value
    }
    own = seconds.pop("xla")
    return f"{min(seconds.values()) / own:.1f}x" if seconds else None


def _setting(name):
    return lambda record: str(record["key"][name])


COLUMNS = (
    Column("B x N x H", lambda r: "{batch} x {heads} x {head_dim}".format(**r["key"])),
    *(Column(n, _setting(n)) for n in ("length", "block", "pattern", "causal", "dtype")),
    Column("kept", lambda r: f"{Problem(**_problem_of(r['key'])).kept_share():.3f}"),
    Column("pass", lambda r: "forward + backward" if r["key"]["backward"] else "forward"),
    Column("xla ms", _milliseconds("xla")),
    Column("hand-written ms", _milliseconds("hand-written")),
    Column("jax.nn ms", _milliseconds("jax.nn")),
    Column("cuDNN ms", _milliseconds("cudnn")),
    Column("xla against fastest", _speedup),
    Column("xla TFLOP/s", lambda r: f"{r['values']['xla']['tflops_per_second']:.3f}"),
    Column("xla MB", _megabytes("xla")),
    Column("jax.nn MB", _megabytes("jax.nn")),
)


def _problem_of(key):
    return {name: value for name, value in key.items() if name != "device"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the points that are missing, write and print the table.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if every function agreed with its reference.
    """
    parsed = vars(parse_arguments((__doc__ or "").splitlines()[0], arguments))
    problems = headline_problems() if parsed.pop("headline") else sweep_problems()
    points = [
        Point(key=dataclasses.asdict(p), make_case=functools.partial(make_case, p))
        for p in problems
    ]
    return 1 if run_points("attention", points, COLUMNS, **parsed) else 0


if __name__ == "__main__":
    sys.exit(main())
