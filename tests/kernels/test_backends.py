"""The dispatcher on a toy table, and what the tables of all ops have in common."""

import logging
from typing import get_args

import pytest

import pallas_kernels
from pallas_kernels import backends
from pallas_kernels.attention_map.call import MapFacts
from pallas_kernels.backends import Backend, Implementation, always, choose_backend
from pallas_kernels.block_sparse_attention.call import AttentionFacts
from pallas_kernels.block_sparse_matmul.call import BlockFacts
from pallas_kernels.nm_matmul.call import NMFacts, PackFacts
from pallas_kernels.tables import TABLES, list_backends


def _refuse(facts):
    raise NotImplementedError(f"needs a machine with {facts} wheels")


def _backend(name, **options):
    return Backend(name=name, run=lambda arrays, facts: (name, arrays, facts), **options)


SLOW = _backend("slow")
ODD = _backend("odd", suits=lambda facts: facts % 2 == 1)
ABSENT = _backend("absent", suits=always, check=_refuse)
ALWAYS = _backend("always", suits=always)
TABLE = (SLOW, ABSENT, ODD, ALWAYS)


def _choose(name, facts=3, table=TABLE):
    return choose_backend("toy", table, name, facts)


@pytest.mark.parametrize("backend", [SLOW, ODD, ALWAYS], ids=lambda backend: backend.name)
def test_a_named_backend_is_taken_whether_it_suits_or_not(backend):
    chosen = _choose(backend.name, facts=2)
    assert chosen is backend and chosen.run("x", 2) == (backend.name, "x", 2)


def test_a_name_that_the_op_lacks_is_refused_with_those_it_has():
    message = r"None or one of \('slow', 'absent', 'odd', 'always'\) for toy, got 'cuda'"
    with pytest.raises(ValueError, match=message):
        _choose("cuda")


def test_a_named_backend_that_cannot_run_gives_its_reason_and_is_not_replaced():
    with pytest.raises(NotImplementedError, match="^needs a machine with 3 wheels$"):
        _choose("absent")


def test_without_a_name_the_first_row_that_suits_and_can_run_is_taken(caplog):
    with caplog.at_level(logging.DEBUG, logger=backends.__name__):
        assert _choose(None) is ODD
        assert _choose(None, facts=2) is ALWAYS
    assert caplog.messages == [
        "toy: chose 'odd' on cpu, 3",
        "toy: chose 'always' on cpu, 2",
    ]
    assert _choose(None, table=(SLOW, ALWAYS, ODD)) is ALWAYS


def test_what_goes_wrong_while_checking_is_not_taken_for_a_refusal():
    def fail(facts):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _choose(None, table=(_backend("broken", suits=always, check=fail), ALWAYS))


def test_a_table_without_a_row_for_everything_says_what_it_lacks():
    with pytest.raises(NotImplementedError, match="toy has no backend for 2"):
        _choose(None, facts=2, table=(SLOW, ABSENT, ODD))


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
    "pack_nm": PackFacts(along_k=True, along_n=False),
}  # fmt: skip


@pytest.mark.parametrize("op", TABLES)
def test_the_last_row_of_every_table_suits_always_and_runs_everywhere(op):
    table, facts = TABLES[op], ODD_FACTS[op]
    last = table[-1]
    assert last.name == "xla" and last.suits is always
    last.check(facts)
    assert choose_backend(op, table, None, facts) is last


@pytest.mark.parametrize("op", TABLES)
def test_every_table_names_its_rows_once_and_its_kernel_is_refused_here(op):
    names = list_backends(op)
    assert callable(getattr(pallas_kernels, op))
    assert len(set(names)) == len(names) and set(names) <= set(get_args(Implementation.__value__))
    with pytest.raises(NotImplementedError):
        choose_backend(op, TABLES[op], "mosaic_sm90", ODD_FACTS[op])


def test_an_op_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"op must be one of \('block_sparse_attention', .*'conv'"):
        list_backends("conv")
