"""The doctor's contract: right kernels pass, and broken ones of every kind are called wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.block_sparse_attention.mosaic_sm90 import attention
from pallas_kernels.block_sparse_matmul.mosaic_sm90 import products as block_products
from pallas_kernels.doctor import trials
from pallas_kernels.doctor.child import measure, prove
from pallas_kernels.doctor.contract import check_contract
from pallas_kernels.doctor.examine import judge
from pallas_kernels.doctor.makers import MAKERS
from pallas_kernels.doctor.report import describe_outcome
from pallas_kernels.doctor.trials import Trial
from pallas_kernels.nm_matmul.mosaic_sm90 import products as nm_products
from pallas_kernels.tables import TABLES
from tests.kernels.interpreter import hopper
from tests.tiers import tier

_CALLS = dict(reversed(trials.list_default_calls()))
ATTENTION = dataclasses.replace(
    _CALLS["block_sparse_attention"],
    num_queries=256,
    num_keys=256,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    mask_shape=(1, 1),
    has_kv_mask=True,
)
NM = dataclasses.replace(_CALLS["nm_matmul"], rows=64, inner=256, columns=64)
BLOCKS = dataclasses.replace(
    _CALLS["block_sparse_matmul"], rows=128, shape=(256, 128), grid=(4, 2), has_bias=True
)
MAP = dataclasses.replace(_CALLS["mean_attention_map"], num_queries=128, num_keys=128, head_dim=32)
PACK = dataclasses.replace(_CALLS["pack_nm"], shape=(128, 128))
PRUNE = dataclasses.replace(_CALLS["prune_mvue"], shape=(32, 96))
SEARCH = dataclasses.replace(_CALLS["transposable_mask"], rows=128, columns=128)
CALLS = {
    "block_sparse_attention": (ATTENTION, "random"),
    "block_sparse_matmul": (BLOCKS, "random"),
    "mean_attention_map": (MAP, "all"),
    "nm_matmul": (NM, "whole"),
    "pack_nm": (PACK, "underfull"),
    "prune_mvue": (PRUNE, "wild"),
    "transposable_mask": (SEARCH, "whole"),
}
HOPPER_OPS = {op: op for op in CALLS if any(row.name == "mosaic_sm90" for row in TABLES[op])}


def _make(op, masks=None, **changes):
    """Make the problem of a small call, with one mask unless others are named."""
    facts, mask = CALLS[op]
    problem = MAKERS[op].make(dataclasses.replace(facts, **changes))
    return problem._replace(masks={name: problem.masks[name] for name in masks or (mask,)})


def _judge(op, problem, implementation):
    """Return what the doctor would say of a kernel."""
    findings = check_contract(problem, implementation, tuple(problem.names))
    answer = {"tile": "", "findings": {d: f._asdict() for d, f in findings.items()}}
    return describe_outcome(judge(Trial(op, implementation, CALLS[op][0]), answer))


@pytest.mark.parametrize("op", tier(HOPPER_OPS, fast=["pack_nm"]))
def test_kernels_are_right_under_the_interpreter(op):
    with hopper():
        assert _judge(op, _make(op), "mosaic_sm90") == "right"


@pytest.mark.ci
def test_a_search_that_is_not_the_first_of_ties_is_wrong():
    problem = _make("transposable_mask", masks=["whole", "zeros", "not finite"])

    def call(implementation, directions):
        search = problem.call("xla", directions)

        def run(inputs, factor):
            # Ties go to the last pattern in the order of columns.
            (mask,) = search((inputs[0][:, ::-1],), factor[:, ::-1])
            return (mask[:, ::-1],)

        return run

    found = _judge("transposable_mask", problem._replace(call=call), "xla")
    assert found.startswith("wrong (forward: mask off by 1")


_TRITON = [op for op in CALLS if any(row.name == "triton" for row in TABLES[op])]


@pytest.mark.ci
@pytest.mark.parametrize("op", _TRITON)
def test_triton_kernels_are_right_under_the_interpreter(op):
    from tests.kernels.triton_interpreter import triton_kernels

    with triton_kernels():
        assert _judge(op, _make(op), "triton") == "right"


@pytest.mark.parametrize("op", CALLS)
def test_portable_backends_are_right_on_every_mask(op):
    facts, _ = CALLS[op]
    problem = MAKERS[op].make(facts)
    assert _judge(op, problem, "xla") == "right"


def _break_lists(patch):
    """Let products of blocks leave out the last entry of every list."""
    start = block_products._start_longest_first

    def shorten(counts, entries):
        return start(jnp.maximum(counts - 1, 0), entries)

    patch.setattr(block_products, "_start_longest_first", shorten)


def _break_packing(patch):
    """Let the 2:4 product read another row's positions."""
    pack = nm_products.pack_weight

    def shift(arrays, facts):
        packed = pack(arrays, facts)
        rolled = jnp.roll(packed.along_k.metadata, 1, axis=-1)
        return dataclasses.replace(packed, along_k=packed.along_k._replace(metadata=rolled))

    patch.setattr(nm_products, "pack_weight", shift)


def _break_key_lists(patch):
    """Let dK and dV read the query blocks of another key block."""
    make = attention.make_key_lists

    def exchange(*args, **options):
        lists = make(*args, **options)
        return dataclasses.replace(lists, entries=jnp.roll(lists.entries, 1, axis=0))

    patch.setattr(attention, "make_key_lists", exchange)


BROKEN_KERNELS = {
    "nm_matmul": _break_packing,
    "block_sparse_matmul": _break_lists,
    "block_sparse_attention": _break_key_lists,
}


@pytest.mark.parametrize("op", tier({op: op for op in BROKEN_KERNELS}, fast=()))
def test_a_broken_kernel_is_wrong_under_the_interpreter(op, monkeypatch):
    BROKEN_KERNELS[op](monkeypatch)
    with hopper():
        assert " off by " in _judge(op, _make(op), "mosaic_sm90")


def _scale(place, factor):
    return lambda results, inputs, count: [
        x * factor if i == place else x for i, x in enumerate(results)
    ]


def _spoil_one_entry(results, inputs, count):
    return [results[0].at[(-1,) * results[0].ndim].add(0.5), *results[1:]]


def _spoil_nothing_but_nan(results, inputs, count):
    return [results[0].at[(0,) * results[0].ndim].set(jnp.nan), *results[1:]]


def _depend_on_what_is_hidden(results, inputs, count):
    return [results[0] + 0 * inputs[1].sum().astype(results[0].dtype), *results[1:]]


FAULTS = {
    "a value off by a twentieth": (_scale(0, 1.05), "forward: out off by"),
    "dv off by a twentieth": (_scale(4, 1.05), "gradient: dv off by"),
    "one entry of the last block": (_spoil_one_entry, "forward: out off by 0.5"),
    "a NaN": (_spoil_nothing_but_nan, "forward: out off by inf"),
    "removed keys": (_depend_on_what_is_hidden, "forward: out off by inf"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_result_is_named(fault):
    spoil, expected = FAULTS[fault]
    problem = _make("block_sparse_attention")

    def call(implementation, directions):
        attend = problem.call("xla", directions)
        return lambda inputs, mask: tuple(spoil(attend(inputs, mask), inputs, None))

    assert expected in _judge("block_sparse_attention", problem._replace(call=call), "xla")


def test_results_that_change_from_call_to_call_are_wrong():
    problem, calls = _make("block_sparse_matmul"), []

    def call(implementation, directions):
        multiply = problem.call("xla", directions)

        def count():
            calls.append(None)
            return jnp.float32(len(calls))

        def run(inputs, mask):
            y, dx, dw, dbias = multiply(inputs, mask)
            drift = jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32))
            return y, dx, dw, dbias + (0.0625 * drift).astype(dbias.dtype)

        return run

    found = _judge("block_sparse_matmul", problem._replace(call=call), "xla")
    assert found == "wrong (gradient: dbias differs when repeated)"


def test_a_pruned_gradient_behind_an_activation_is_compared_by_its_norm():
    changes = {"activation": "gelu", "grad_pruning": "mvue", "rows": 128}
    problem = _make("nm_matmul", **changes)
    assert problem.drawn == ("dw",)
    assert _judge("nm_matmul", problem, "xla") == "right"

    def call(implementation, directions):
        # What a kernel that prunes the wrong tokens returns.
        multiply = problem.call("xla", directions)

        def run(inputs, mask):
            y, dx, dw, *rest = multiply(inputs, mask)
            return y, dx, jnp.roll(dw, 1, axis=0), *rest

        return run

    found = _judge("nm_matmul", problem._replace(call=call), "xla")
    assert found.startswith("wrong (gradient: dw off by")


_TURNS = {
    "a draw now and then": (lambda x: x.at[0, 0].set(0), "right"),
    "a row": (lambda x: x.at[-1].set(0), "pruned off by 0.0"),
    "the last bits": (lambda x: (x.astype(jnp.float32) * 1.01).astype(x.dtype), "pruned off by"),
}


@pytest.mark.parametrize("fault", _TURNS)
def test_pruned_entries_are_compared_one_by_one(fault):
    turn, expected = _TURNS[fault]
    problem = _make("prune_mvue", masks=["ordinary"], shape=(512, 512))

    def call(implementation, directions):
        def run(inputs, x):
            pruned, mask = problem.call("xla", directions)(inputs, x)
            return turn(pruned), mask

        return run

    assert expected in _judge("prune_mvue", problem._replace(call=call), "xla")


def test_a_child_proves_and_times_a_trial_and_says_what_it_refuses():
    tiles = []
    trial = Trial("block_sparse_matmul", "xla", dataclasses.replace(BLOCKS, has_bias=False))
    outcome = judge(trial, prove(trial, tiles.append) | {"tile": tiles[0]})
    assert outcome.is_right and describe_outcome(outcome) == "right"
    timings = measure(trial, tiles.append)["timings"]
    assert [timing["density"] for timing in timings] == [0.1, 0.5]
    assert timings[0]["sizes"] == (128, 256, 128) and set(timings[0]["seconds"]) == {"xla", "dense"}
    kernel = trial._replace(backend="mosaic_sm90")
    refusal = prove(kernel, tiles.append)["refused"]
    assert "needs a Hopper GPU (compute capability 9), found 'cpu'" in refusal


@pytest.mark.slow
def test_a_head_dim_without_gradients_is_proven_forward_only():
    facts = dataclasses.replace(
        ATTENTION, head_dim=256, num_queries=256, num_keys=256, block_q=128, block_kv=128
    )
    trial, tiles = Trial("block_sparse_attention", "mosaic_sm90", facts), []
    with hopper():
        answer = prove(trial, tiles.append)
    outcome = judge(trial, answer | {"tile": tiles[0]})
    assert describe_outcome(outcome).startswith("right, no gradient: ")
