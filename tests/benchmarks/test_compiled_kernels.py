"""The committed report of compiled Triton kernels: fresh, whole, without faults, and repeatable."""

import itertools

import pytest

from benchmarks import compiled_kernels
from benchmarks.compiled_kernels import (
    CALLS,
    describe_program,
    find_faults,
    list_targets,
    read_records,
)
from pallas_kernels.attention_map.triton import tiles as map_tiles
from pallas_kernels.block_sparse_attention.triton import tiles as attention_tiles
from pallas_kernels.block_sparse_matmul.triton import tiles as product_tiles
from pallas_kernels.nm_matmul.triton import tiles as packing_tiles
from pallas_kernels.source_hash import hash_modules
from pallas_kernels.tables import TABLES
from pallas_kernels.transposable_mask.triton import tiles as transposable_tiles
from tests.tiers import tier

pytest.importorskip("jax_triton")

# What tensor cores of a family are called in machine code: of large tiles, and of small ones.
_TENSOR_CORES = {8: ("HMMA",), 9: ("HGMMA", "HMMA"), 10: ("UTCHMMA", "HMMA"), 12: ("HMMA",)}
_PRODUCTS = ("block_sparse_attention", "block_sparse_matmul", "mean_attention_map")


def _list_programs(op):
    for program in read_records(op)["programs"]:
        yield program["call"], tuple(program["capability"]), program["kernels"]


def test_every_op_in_triton_is_reported():
    in_triton = {op for op, rows in TABLES.items() if any(r.name == "triton" for r in rows)}
    assert set(CALLS) == in_triton


@pytest.mark.parametrize("op", CALLS)
def test_the_report_is_of_the_kernels_as_they_are(op):
    assert read_records(op)["source"] == compiled_kernels.hash_kernels(op), "make compiled-report"


@pytest.mark.parametrize("op", CALLS)
def test_every_call_is_reported_for_every_capability(op):
    reported = [(call, capability) for call, capability, _ in _list_programs(op)]
    calls = [describe_program(op, facts) for facts in CALLS[op]]
    assert len(set(calls)) == len(calls)
    assert set(reported) == set(itertools.product(calls, list_targets()))
    assert len(reported) == len(set(reported))


@pytest.mark.parametrize("op", CALLS)
def test_no_kernel_spills_and_all_fit(op):
    faults = [
        (call, capability, kernel["name"], fault)
        for call, capability, kernels in _list_programs(op)
        for kernel in kernels
        for fault in find_faults(kernel, capability)
    ]
    assert not faults


def test_a_spill_and_too_much_shared_memory_are_faults():
    kernel = {"spill_bytes": 0, "stack_bytes": 0, "shared_memory_bytes": 101_376}
    assert find_faults(kernel, (8, 6)) == []
    assert find_faults(kernel | {"spill_bytes": 8}, (8, 6)) == ["8 bytes spilled, stack 0"]
    (fault,) = find_faults(kernel | {"shared_memory_bytes": 101_377}, (8, 6))
    assert fault == "101377 bytes of shared memory on NVIDIA GeForce RTX 3090"


@pytest.mark.parametrize("op", _PRODUCTS)
def test_products_run_on_tensor_cores_and_tiles_are_copied_ahead(op):
    for call, capability, kernels in _list_programs(op):
        names = _TENSOR_CORES[capability[0]]
        for kernel in kernels:
            found, where = kernel["instructions"], (call, capability, kernel["name"])
            assert ("float32" in call) != any(name in found for name in names), where
            # dK and dV of wide heads find no room for a second tile.
            is_wide = "head_dim=256" in call and kernel["name"].endswith("_keys")
            assert is_wide or "LDGSTS" in found, where


def test_sparse_products_run_on_sparse_tensor_cores_alone():
    products = [
        (call, capability, kernel)
        for call, capability, kernels in _list_programs("nm_matmul")
        for kernel in kernels
        if kernel["name"] == "multiply_sparse"
    ]
    assert {capability for _, capability, _ in products} == set(list_targets())
    for call, capability, kernel in products:
        found, where = kernel["instructions"], (call, capability)
        # Of all products of tensor cores, as many are sparse: none is dense.
        assert found["HMMA.SP"] == found["HMMA"] >= 1, where
        assert not {"HGMMA", "UTCHMMA"} & set(found), where
        assert found["LDSM"] >= 1 and found["LDGSTS"] >= 1, where
        assert kernel["spill_bytes"] == kernel["stack_bytes"] == 0, where


@pytest.mark.parametrize("op", _PRODUCTS)
@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_large_tiles_take_the_instructions_of_their_family(op, capability):
    name = _TENSOR_CORES[capability[0]][0]
    large = [
        kernels
        for call, found, kernels in _list_programs(op)
        if found == capability and "bfloat16" in call
        and ("block=128x128" in call or "head_dim=64, block_q=128, block_kv=128" in call
             or call.endswith("head_dim=64)"))
    ]  # fmt: skip
    assert large
    assert all(name in kernel["instructions"] for kernels in large for kernel in kernels)


def test_calls_reach_every_entry_of_the_tables():
    capabilities = set(list_targets())
    reached = {
        (2 if "16" in facts.dtype else 4, max(facts.head_dim, 64))
        for facts in CALLS["block_sparse_attention"]
    }
    assert set(attention_tiles.CAPABILITIES) == capabilities
    assert reached == set(attention_tiles._AMPERE) | set(attention_tiles._BLACKWELL)
    assert set(product_tiles.CAPABILITIES) == capabilities
    dtypes = {2 if "16" in facts.dtype else 4 for facts in CALLS["block_sparse_matmul"]}
    assert dtypes == set(product_tiles._AMPERE)
    reached = {
        (2 if "16" in facts.dtype else 4, max(1 << (facts.head_dim - 1).bit_length(), 64))
        for facts in CALLS["mean_attention_map"]
    }
    assert set(map_tiles.CAPABILITIES) == capabilities
    assert all(reached == set(map_tiles._TABLE[c]) for c in capabilities)
    assert set(packing_tiles.CAPABILITIES) == capabilities
    assert set(transposable_tiles.CAPABILITIES) == capabilities


def _compare(op, facts, capability):
    call = describe_program(op, facts)
    (recorded,) = (k for c, found, k in _list_programs(op) if (c, found) == (call, capability))
    versions = read_records(op)["versions"]
    if versions != compiled_kernels.find_versions():
        pytest.skip(f"the report was made with {versions}")
    assert compiled_kernels.compile_call(op, facts, capability) == recorded


@pytest.mark.parametrize(
    "op",
    tier({op: op for op in CALLS}, fast=(), slow={*CALLS} - {"nm_matmul", "transposable_mask"}),
)
def test_a_sample_compiles_to_what_is_reported(op):
    _compare(op, CALLS[op][0], (8, 6))
    _compare(op, CALLS[op][-1], (10, 0))


@pytest.mark.slow
@pytest.mark.parametrize("op", CALLS)
def test_everything_compiles_to_what_is_reported(op):
    for facts, capability in itertools.product(CALLS[op], list_targets()):
        _compare(op, facts, capability)


def test_comments_do_not_make_a_report_stale(tmp_path, monkeypatch):
    package = tmp_path / "pallas_kernels_copy"
    package.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    (package / "__init__.py").write_text("")
    hashes = []
    for text in ("x = 1\n", '"""Of x."""\n\n# One.\nx = 1\n', "x = 2\n"):
        (package / "tiles.py").write_text(text)
        hashes.append(hash_modules("pallas_kernels_copy"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_what_was_compiled_is_not_compiled_again(tmp_path, monkeypatch):
    op, compiled = "block_sparse_matmul", []

    def compile_call(op, facts, capability):
        compiled.append(capability)
        if len(compiled) == 4:
            raise KeyboardInterrupt
        return [dict.fromkeys(("spill_bytes", "stack_bytes", "shared_memory_bytes"), 0)]

    monkeypatch.setattr(compiled_kernels, "FOLDER", tmp_path)
    monkeypatch.setattr(compiled_kernels, "CALLS", {op: CALLS[op][:1]})
    monkeypatch.setattr(compiled_kernels, "compile_call", compile_call)
    with pytest.raises(KeyboardInterrupt):
        compiled_kernels._compile_op(op)
    compiled_kernels._compile_op(op)
    assert compiled == [*list(list_targets())[:4], *list(list_targets())[3:]]
    # Other kernels, and everything is compiled anew.
    monkeypatch.setattr(compiled_kernels, "hash_kernels", lambda op: "other")
    compiled_kernels._compile_op(op)
    assert len(compiled) == 13
