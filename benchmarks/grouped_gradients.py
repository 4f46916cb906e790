"""Do gradients of grouped queries gain by being split by query head?

    python -m benchmarks.grouped_gradients [--headline] [--force] [--budget-seconds=N]

Attention forward and backward at batch 1, four query heads for each of four key heads, in the
Hopper kernels: "chosen" splits the gradients of keys as `choose_parts` says, "whole" never does.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.harness import Case, Point, parse_arguments, run_points
from benchmarks.records import Column
from pallas_kernels import block_sparse_attention
from pallas_kernels.block_sparse_attention.mosaic_sm90 import attention
from pallas_kernels.doctor.timing import make_random

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 16, 4, 128, 128
SETTINGS = [(length, density) for length in (2048, 4096, 8192) for density in (0.1, 0.5, 1.0)]


def make_gradient(implementation: Any, *, whole: bool = False) -> Callable[..., Any]:
    """Make a function that computes the gradients of causal attention.

    Args:
      implementation: of `block_sparse_attention`.
      whole: bool, never split the query heads of a key head.

    Returns:
      function (q, k, v, d_out, mask) -> (dq, dk, dv).
    """

    def gradient(q, k, v, d_out, mask):
        attend: Any = functools.partial(
            block_sparse_attention, block_q=BLOCK, block_kv=BLOCK, causal=True,
            implementation=implementation,
        )  # fmt: skip
        choose = (lambda *_: 1) if whole else attention.choose_parts
        with mock.patch.object(attention, "choose_parts", choose):
            return jax.vjp(lambda *qkv: attend(*qkv, mask), q, k, v)[1](d_out)

    return gradient


def make_case(length: int, density: float) -> Case:
    """Make the case of one length and density.

    Args:
      length: int, T = S.
      density: float, share of blocks kept; those of the diagonal are kept always.
    """
    q = jax.ShapeDtypeStruct((1, length, HEADS, HEAD_DIM), "bfloat16")
    k = jax.ShapeDtypeStruct((1, length, KV_HEADS, HEAD_DIM), "bfloat16")
    grid = length // BLOCK
    mask = jax.random.uniform(jax.random.key(0), (1, 1, grid, grid)) < density
    return Case(
        functions={
            "chosen": make_gradient("mosaic_sm90"),
            "whole": make_gradient("mosaic_sm90", whole=True),
        },
        args=(*make_random((q, k, k, q)), mask | jnp.eye(grid, dtype=bool)),
        reference=make_gradient("xla"),
        tolerance=0.02,
    )


def _gain(record: Any) -> str | None:
    whole, chosen = (record["values"][name]["median_seconds"] for name in ("whole", "chosen"))
    return f"{whole / chosen:.2f}x"


TABLE = (
    Column("length", lambda r: str(r["key"]["length"])),
    Column("density", lambda r: str(r["key"]["density"])),
    *(
        Column(
            f"{name}, ms", lambda r, name=name: f"{1e3 * r['values'][name]['median_seconds']:.3f}"
        )
        for name in ("whole", "chosen")
    ),
    Column("chosen is faster", _gain),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the points that are missing, write and print the table.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if both agree with the reference, 2 without a GPU.
    """
    parsed = vars(parse_arguments((__doc__ or "").splitlines()[0], arguments))
    parsed.pop("headline")
    if jax.default_backend() != "gpu":
        print("the Hopper kernels need a GPU, found none", file=sys.stderr)
        return 2
    points = [
        Point({"length": n, "density": d}, functools.partial(make_case, n, d)) for n, d in SETTINGS
    ]
    return 1 if run_points("grouped_gradients", points, TABLE, **parsed) else 0


if __name__ == "__main__":
    sys.exit(main())
