"""How fast is block-sparse attention beside dense attention, per density, pattern and length?

    python -m benchmarks.attention [--headline] [--force] [--budget-seconds=N]

Every function of a point is checked before it is timed: those that apply the block mask against
the dense implementation, cuDNN and PyTorch's SDPA, which have no use for one, against dense
attention without it. A point with the pattern "full" has no mask to apply.

On a GPU the block schedule is made beforehand, as in training. Operands of less than 128 MB would
stay in the 50 to 60 MB of cache that a GPU has, so that later calls would find what a training
step has to load: there each function is called with several sets of random inputs in turns, as
many as fill 128 MB.
"""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.attention_peers import attention_by_hand, cudnn_attention, jax_attention
from benchmarks.attention_problems import Problem, headline_problems, sweep_problems
from benchmarks.attention_report import COLUMNS, TRITON, evaluate_targets, plot_speedups
from benchmarks.attention_torch import FLEX, SDPA, make_torch_calls
from benchmarks.environment import device_name, find_triton_refusal
from benchmarks.harness import RESULTS, Case, Point, parse_arguments, run_points
from benchmarks.records import Results
from pallas_kernels import BlockSchedule, block_sparse_attention, make_block_schedule
from pallas_kernels.doctor.timing import make_random

# Dense attention keeps several arrays of all logits; beyond this many bytes for one of them a
# machine with 16 GB, or a GPU with 80 GB, no longer holds a forward and backward pass.
MAX_LOGITS_BYTES = {"cpu": 1 << 29, "gpu": 1 << 33}
RING_BYTES = 128 * 10**6


def _op(q, k, v, mask_or_schedule, problem, implementation):
    return block_sparse_attention(
        q,
        k,
        v,
        mask_or_schedule,
        block_q=problem.block,
        block_kv=problem.block,
        causal=problem.causal,
        implementation=implementation,
    )


def _timed(attention, problem, *, takes_schedule=False, without_mask=False):
    """Function of (q, k, v, d_out, mask, schedule) that is timed: attention, gradients if asked."""

    def attend(q, k, v, mask, schedule):
        pattern = None if without_mask else schedule if takes_schedule else mask
        return attention(q, k, v, pattern, problem)

    def forward(q, k, v, d_out, mask, schedule):
        return attend(q, k, v, mask, schedule)

    def forward_and_backward(q, k, v, d_out, mask, schedule):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, mask, schedule), q, k, v)
        return out, vjp(d_out)

    return forward_and_backward if problem.backward else forward


def _sparse(problem, implementation, **options):
    attention = functools.partial(_op, implementation=implementation)
    return _timed(attention, problem, takes_schedule=implementation != "dense", **options)


def count_input_sets(operand_bytes: int) -> int:
    """Return how many sets of inputs a function is called with in turns.

    Args:
      operand_bytes: int, of one set.

    Returns:
      int, 1 if one set exceeds the cache by itself, at most 8.
    """
    return min(8, max(1, math.ceil(RING_BYTES / operand_bytes)))


def make_case(problem: Problem) -> Case:
    """Make the functions that one point compares.

    Args:
      problem: the setting.

    Returns:
      Case; the dense peers are absent where one array of logits is too large for the machine.
    """
    if jax.devices()[0].platform != "cpu":
        return make_gpu_case(problem, compute_capability=jax.devices()[0].compute_capability)
    peers = {"hand-written": attention_by_hand, "jax.nn": jax_attention}
    case = _make_common(problem, {name: _timed(f, problem) for name, f in peers.items()}, "cpu")
    mask, inputs = problem.make_mask(), _make_inputs(problem, 1)
    foreign, missing = make_torch_calls(problem, inputs, mask)
    return case._replace(
        # Called with the mask, the op makes the schedule as part of what is timed.
        args=(*inputs[0], mask, mask),
        references={SDPA: _reference(problem, "cpu", without_mask=True)},
        foreign=foreign,
        flops={
            **dict.fromkeys((*case.functions, FLEX), problem.flops()),
            SDPA: _without_mask(problem).flops(),
        },
        absent={**case.absent, **missing},
    )


def make_gpu_case(problem: Problem, *, compute_capability: str) -> Case:
    """Make the functions that one point compares on a GPU.

    Args:
      problem: the setting.
      compute_capability: str, such as "9.0"; the Hopper kernels run on 9.
    """
    on_hopper = compute_capability.startswith("9.")
    blocks = problem.length // problem.block
    mask = problem.make_mask()
    schedule = make_block_schedule(jnp.ones((1, 1, blocks, blocks), bool) if mask is None else mask)
    operand_bytes = (
        (4 if problem.backward else 3)
        * problem.batch
        * problem.length
        * problem.heads
        * problem.head_dim
        * jnp.dtype(problem.dtype).itemsize
    )
    ring = _make_inputs(problem, count_input_sets(operand_bytes))
    all_args = [(*arrays, mask, schedule) for arrays in ring]
    if problem.measure == "schedule":
        return _make_schedule_case(problem, all_args, on_hopper=on_hopper)

    case = _make_common(problem, {"jax.nn": _timed(jax_attention, problem)}, "gpu")
    functions, absent = dict(case.functions), dict(case.absent)
    refusal, foreign = find_triton_refusal(), {}
    if refusal is None:
        functions[TRITON] = _sparse(problem, TRITON)
    else:
        absent[TRITON] = refusal
    if jnp.dtype(problem.dtype).itemsize == 2:
        if on_hopper:
            functions["mosaic_sm90"] = _sparse(problem, "mosaic_sm90")
        else:
            absent["mosaic_sm90"] = f"needs compute capability 9, found {compute_capability}"
        functions["cudnn"] = _timed(cudnn_attention, problem)
        foreign, missing = make_torch_calls(problem, ring, mask)
        absent |= missing
    dense_flops = _without_mask(problem).flops()
    return case._replace(
        functions=functions,
        args=all_args[0],
        more_args=all_args[1:],
        # These two apply no block mask: dense attention without one is what they compute.
        references=dict.fromkeys(("cudnn", SDPA), _reference(problem, "gpu", without_mask=True)),
        foreign=foreign,
        flops={
            **dict.fromkeys((*functions, FLEX), problem.flops()),
            **dict.fromkeys(("jax.nn", "cudnn", SDPA), dense_flops),
        },
        absent=absent,
    )


def _without_mask(problem):
    settings = {**problem.key(), "pattern": "full", "measure": "attention"}
    return Problem(**settings)


def _make_inputs(problem, count):
    shape = (problem.batch, problem.length, problem.heads, problem.head_dim)
    specs = (jax.ShapeDtypeStruct(shape, problem.dtype),) * 4
    return [make_random(specs, seed=seed) for seed in range(count)]


def _fits(problem, platform):
    logits_bytes = 4 * problem.batch * problem.heads * problem.length**2
    return logits_bytes <= MAX_LOGITS_BYTES[platform]


def _reference(problem, platform, *, without_mask=False):
    dense = _fits(problem, platform)
    return _sparse(problem, "dense" if dense else "xla", without_mask=without_mask)


def _make_common(problem: Problem, peers: dict[str, Callable[..., Any]], platform: str) -> Case:
    absent = {}
    if not _fits(problem, platform):
        absent = dict.fromkeys(peers, "its logits do not fit the machine")
        peers = {}
    return Case(
        functions={"xla": _sparse(problem, "xla"), **peers},
        args=(),
        reference=_reference(problem, platform),
        tolerance=1e-3 if problem.dtype == "float32" else 2e-2,
        flops={"xla": problem.flops()},
        absent=absent,
    )


def _make_schedule_case(problem, all_args, *, on_hopper):
    def make_schedule(q, k, v, d_out, mask, schedule):
        return make_block_schedule(mask)

    def list_by_keys(q, k, v, d_out, mask, schedule):
        # Kept blocks in order, then pruned ones: keys that are all different sort in one way.
        def order(mask):
            size = mask.shape[-1]
            return jnp.argsort(jnp.where(mask, 0, size) + jnp.arange(size), axis=-1)

        columns = mask.swapaxes(-1, -2)
        return BlockSchedule(
            kv_counts=mask.sum(axis=-1),
            kv_indices=order(mask),
            q_counts=columns.sum(axis=-1),
            q_indices=order(columns),
        )

    served = "mosaic_sm90" if on_hopper else "xla"
    return Case(
        functions={served: _sparse(problem, served), "schedule": make_schedule},
        args=all_args[0],
        more_args=all_args[1:],
        reference=_reference(problem, "gpu"),
        references={"schedule": list_by_keys},
        tolerance=2e-2,
        flops={served: problem.flops()},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the points that are missing; write and print table, plot and targets.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if every function agreed with its reference. A missed target is no error.
    """
    parsed = vars(parse_arguments((__doc__ or "").splitlines()[0], arguments))
    choose_problems = headline_problems if parsed.pop("headline") else sweep_problems
    points = [
        Point(key=problem.key(), make_case=functools.partial(make_case, problem))
        for problem in choose_problems(jax.devices()[0].platform)
    ]
    failures = run_points("attention", points, COLUMNS, **parsed)
    records = Results(RESULTS / "attention.json").records
    print(plot_speedups(records, device_name(), RESULTS / "attention_density.png"))
    print(evaluate_targets(records))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
