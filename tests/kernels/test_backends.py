"""The dispatcher on a toy table, and what the tables of all ops have in common."""

import dataclasses
import logging
from typing import ClassVar, get_args

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import backends, choose_implementation
from pallas_kernels.attention_map.call import MapFacts
from pallas_kernels.backends import (
    Backend,
    Implementation,
    always,
    choose_backend,
    explain_choice,
    record_choices,
    use_recorded,
)
from pallas_kernels.block_sparse_attention.call import AttentionFacts
from pallas_kernels.block_sparse_matmul.call import BlockFacts
from pallas_kernels.dispatch import make_abstract_gpu
from pallas_kernels.nm_matmul.call import NMFacts, PackFacts, PruneFacts
from pallas_kernels.tables import TABLES, list_backends
from pallas_kernels.transposable_mask.call import TransposableFacts
from pallas_kernels.verdict_files import use_verdicts
from pallas_kernels.verdicts import Timing, Verdict, Verdicts, make_key


@dataclasses.dataclass(frozen=True)
class _Facts:
    """Facts of a toy op: what its kernels are compiled for, and how large the call is."""

    wheels: int
    size: int = 100

    DIRECTIONS: ClassVar[tuple[str, ...]] = ("forward", "gradient")

    @property
    def kernel_options(self):
        return {"wheels": self.wheels}

    @property
    def sizes(self):
        return (self.size,)


def _refuse(facts):
    raise NotImplementedError(f"needs a machine with {facts.wheels} wheels")


def _run(arrays, facts):
    return arrays, facts


def _backend(name, **options):
    return Backend(name=name, run=options.pop("run", _run), **options)


SLOW = _backend("slow")
ODD = _backend("odd", suits=lambda facts: facts.wheels % 2 == 1)
ABSENT = _backend("absent", suits=always, check=_refuse)
ALWAYS = _backend("always", suits=always)
TABLE = (SLOW, ABSENT, ODD, ALWAYS)

KERNEL = _backend("kernel", needs_verdict=True, tile=lambda facts: f"tile {facts.size // 1000}")
OTHER = _backend("other", needs_verdict=True)
KERNELS = (KERNEL, OTHER, ALWAYS)


def _choose(name, wheels=3, table=TABLE, **facts):
    return choose_backend("toy", table, name, _Facts(wheels, **facts))


def _verdicts(*rows, direction=None):
    """Make verdicts: (backend, {name: seconds} or why it is wrong), at size 100, with 3 wheels."""
    made = []
    for backend, outcome in rows:
        for d in _Facts.DIRECTIONS if direction is None else (direction,):
            key, is_wrong = make_key("toy", backend, d, _Facts(3)), isinstance(outcome, str)
            timings = () if is_wrong else (Timing((100,), 0.5, outcome),)
            made.append(
                Verdict(key=key, sizes=(100,), wrong=outcome if is_wrong else "", timings=timings)
            )
    return Verdicts(made)


@pytest.mark.parametrize("backend", [SLOW, ODD, ALWAYS], ids=lambda backend: backend.name)
def test_a_named_backend_is_taken_whether_it_suits_or_not(backend):
    assert _choose(backend.name, wheels=2) is backend


def test_a_name_that_the_op_lacks_is_refused_with_those_it_has():
    message = r"None or one of \('slow', 'absent', 'odd', 'always'\) for toy, got 'cuda'"
    with pytest.raises(ValueError, match=message):
        _choose("cuda")


def test_a_named_backend_that_cannot_run_gives_its_reason_and_is_not_replaced():
    with pytest.raises(NotImplementedError, match="^needs a machine with 3 wheels$"):
        _choose("absent")


def test_without_a_name_or_a_verdict_the_first_row_that_suits_and_can_run_is_taken(caplog):
    with caplog.at_level(logging.DEBUG, logger=backends.__name__):
        assert _choose(None) is ODD
        assert _choose(None, wheels=2) is ALWAYS
    assert caplog.messages == [
        "toy(wheels=3): 'odd' on cpu: runs everywhere",
        "toy(wheels=2): 'always' on cpu: runs everywhere",
    ]
    assert _choose(None, table=(SLOW, ALWAYS, ODD)) is ALWAYS


def test_what_goes_wrong_while_checking_is_not_taken_for_a_refusal():
    def fail(facts):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _choose(None, table=(_backend("broken", suits=always, check=fail), ALWAYS))


def test_a_table_without_a_row_for_everything_says_what_it_lacks():
    with pytest.raises(NotImplementedError, match="toy has no backend for"):
        _choose(None, wheels=2, table=(SLOW, ABSENT, ODD))


def test_the_fastest_proven_kernel_is_taken_and_the_others_say_why_not():
    times = {"always": 4.0, "kernel": 2.0}
    with use_verdicts(_verdicts((KERNEL, times), (OTHER, {"always": 4.0, "other": 1.0}))):
        choice = explain_choice("toy", KERNELS, None, _Facts(3))
        assert choice.backend == "other"
        assert choice.reason == "right on this device, 4x as fast as 'always'"
    with use_verdicts(_verdicts((KERNEL, times), (OTHER, "hang"))):
        choice = explain_choice("toy", KERNELS, None, _Facts(3))
        assert choice.backend == "kernel"
        assert choice.others == {"other": "wrong on this device (hang)"}
    with use_verdicts(_verdicts((KERNEL, {"always": 4.0, "kernel": 5.0}))):
        choice = explain_choice("toy", KERNELS, None, _Facts(3))
        assert choice.backend == "always"
        assert choice.others == {
            "kernel": "right, but takes 1.25 of the time of 'always'",
            "other": "not proven on this device (forward, gradient)",
        }


@pytest.mark.parametrize(
    "facts, reason",
    [
        (_Facts(3, size=99), "right, but no size up to this one was timed"),
        (_Facts(3, size=1000), "not proven on this device (forward, gradient)"),  # another tile
        (_Facts(4), "not proven on this device (forward, gradient)"),
    ],
)
def test_a_verdict_belongs_to_its_key_and_to_calls_no_smaller_than_were_timed(facts, reason):
    with use_verdicts(_verdicts((KERNEL, {"always": 4.0, "kernel": 2.0}))):
        choice = explain_choice("toy", (KERNEL, ALWAYS), None, facts)
    assert (choice.backend, choice.others) == ("always", {"kernel": reason})


def test_one_direction_is_not_enough_and_one_wrong_one_is_too_much():
    times = {"always": 4.0, "kernel": 2.0}
    forward = _verdicts((KERNEL, times), direction="forward")
    with use_verdicts(forward):
        choice = explain_choice("toy", (KERNEL, ALWAYS), None, _Facts(3))
        assert choice.others == {"kernel": "not proven on this device (gradient)"}
    with use_verdicts(Verdicts([*forward, *_verdicts((KERNEL, "crash"), direction="gradient")])):
        choice = explain_choice("toy", (KERNEL, ALWAYS), None, _Facts(3))
        assert choice.others == {"kernel": "wrong on this device (crash)"}


def test_a_verdict_about_another_source_is_none():
    def run(arrays, facts):
        return arrays

    run.__module__ = "pallas_kernels.attention_map.xla"
    with use_verdicts(_verdicts((KERNEL, {"always": 4.0, "kernel": 2.0}))):
        changed = dataclasses.replace(KERNEL, run=run)
        assert _choose(None, table=(changed, ALWAYS)) is ALWAYS
        assert _choose(None, table=(KERNEL, ALWAYS)) is KERNEL


def test_every_fallback_is_told_once_with_its_reason(caplog, monkeypatch):
    backends._tell_fallback.cache_clear()
    monkeypatch.setattr(backends, "runs_on_own_gpu", lambda: True)
    refused = dataclasses.replace(KERNEL, check=_refuse)
    slow = _verdicts((KERNEL, {"always": 1.0, "kernel": 2.0}))
    with caplog.at_level(logging.INFO, logger=backends.__name__):
        for _ in range(3):
            assert _choose(None, table=(KERNEL, ALWAYS)) is ALWAYS
            assert _choose(None, table=(refused, ALWAYS)) is ALWAYS
        with use_verdicts(slow):
            assert _choose(None, table=(KERNEL, ALWAYS)) is ALWAYS
        with use_verdicts(_verdicts((KERNEL, {"always": 2.0, "kernel": 1.0}))):
            assert _choose(None, table=(KERNEL, ALWAYS)) is KERNEL
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert told == [
        (
            "WARNING",
            "toy takes 'always' (kernel: not proven on this device (forward, gradient)); "
            "`python -m pallas_kernels.doctor` proves kernels",
        ),
        ("INFO", "toy takes 'always' (kernel: needs a machine with 3 wheels)"),
        ("INFO", "toy takes 'always' (kernel: right, but takes 2 of the time of 'always')"),
    ]
    backends._tell_fallback.cache_clear()


def test_a_recorded_choice_is_kept_and_refused_in_words_where_it_cannot_be():
    before = {"toy(wheels=3)": "kernel"}
    with use_recorded(before):
        assert _choose(None, table=KERNELS) is KERNEL
        assert _choose("other", table=KERNELS) is OTHER
        assert _choose(None, table=KERNELS, wheels=4) is ALWAYS
        message = r"^toy\(wheels=3\) ran on 'kernel' before, which cannot go on here: "
        wrong = message + r"wrong on this device \(hang\)"
        with (
            use_verdicts(_verdicts((KERNEL, "hang"))),
            pytest.raises(NotImplementedError, match=wrong),
        ):
            _choose(None, table=KERNELS)
        with pytest.raises(NotImplementedError, match=message + "needs a machine with 3 wheels"):
            _choose(None, table=(dataclasses.replace(KERNEL, check=_refuse), ALWAYS))
    proven = _verdicts((KERNEL, {"always": 4.0, "kernel": 2.0}))
    with use_recorded({"toy(wheels=3)": "always"}), use_verdicts(proven):
        assert _choose(None, table=KERNELS) is ALWAYS


def test_kernels_taken_to_be_right_are_chosen_in_the_order_of_the_table():
    with use_verdicts(Verdicts(assumed=True)):
        choice = explain_choice("toy", KERNELS, None, _Facts(3))
        assert (choice.backend, choice.reason) == ("kernel", "taken to be right there and faster")
        absent = dataclasses.replace(KERNEL, check=_refuse)
        assert _choose(None, table=(absent, OTHER, ALWAYS)) is OTHER


def test_choices_are_recorded_while_a_function_is_traced():
    x, w = jnp.ones((8, 128), jnp.bfloat16), jnp.ones((128, 64), jnp.bfloat16)
    mask = jnp.arange(128)[:, None] % 4 < jnp.full(64, 2)
    gpu = make_abstract_gpu("NVIDIA H200", 132)
    with (
        record_choices() as choices,
        use_verdicts(Verdicts(assumed=True)),
        jax.sharding.use_abstract_mesh(gpu),
        record_choices() as inner,
    ):
        jax.eval_shape(pallas_kernels.nm_matmul, x, w, mask)
    assert [(choice.op, choice.backend) for choice in choices] == [("nm_matmul", "mosaic_sm90")]
    assert choices == inner
    assert choices[0].call.startswith("nm_matmul(dtype=bfloat16, pattern=2:4")


# What no kernel takes, and no backend but the portable one is meant for.
ODD_FACTS = {
    "block_sparse_attention": AttentionFacts(
        batch=1, num_queries=15, num_keys=25, num_heads=3, num_kv_heads=1, head_dim=7,
        dtype="float32", mask_shape=(1, 3), block_q=3, block_kv=5, causal=True, has_kv_mask=True,
        has_segments=False, scale=-1.0, pruned_logits="zero", return_lse=True,
    ),
    "block_sparse_matmul": BlockFacts(rows=3, shape=(15, 21), grid=(5, 3), dtype="float32"),
    "mean_attention_map": MapFacts(
        num_queries=15, num_keys=25, head_dim=7, dtype="float32", causal=False
    ),
    "nm_matmul": NMFacts(rows=3, inner=15, columns=7, dtype="float32", pattern=(2, 5)),
    "pack_nm": PackFacts(along_k=True, along_n=False, shape=(64, 64), dtype="bfloat16"),
    "prune_mvue": PruneFacts(shape=(8, 3), axis=0, dtype="float64"),
    "transposable_mask": TransposableFacts(rows=12, columns=20, dtype="float64"),
}  # fmt: skip


@pytest.mark.parametrize("op", TABLES)
def test_the_last_row_of_every_table_suits_always_and_runs_everywhere(op):
    table, facts = TABLES[op], ODD_FACTS[op]
    last = table[-1]
    assert last.name == "xla" and last.suits is always
    last.check(facts)
    assert choose_backend(op, table, None, facts) is last
    assert choose_implementation(op, facts).backend == "xla"


@pytest.mark.parametrize("op", TABLES)
def test_every_table_names_its_rows_once_and_its_kernel_is_refused_here(op):
    names = list_backends(op)
    assert callable(getattr(pallas_kernels, op))
    assert len(set(names)) == len(names) and set(names) <= set(get_args(Implementation.__value__))
    assert TABLES[op][0].needs_verdict
    for kernel in (backend for backend in TABLES[op] if backend.needs_verdict):
        with pytest.raises(NotImplementedError):
            choose_backend(op, TABLES[op], kernel.name, ODD_FACTS[op])


def test_an_op_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"op must be one of \('block_sparse_attention', .*'conv'"):
        list_backends("conv")
    with pytest.raises(ValueError, match=r"op must be one of .*'conv'"):
        choose_implementation("conv", None)
