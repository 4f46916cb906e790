"""The prediction for the 2:4 products in Triton: its counts, and the table that is committed."""

import pytest

from benchmarks import sparse_tiles
from benchmarks.compiled_kernels import find_versions, hash_kernels, list_targets
from benchmarks.sparse_tiles import RATES, Cycles, count_cycles, list_tiles, read_counts
from pallas_kernels import aot
from pallas_kernels.nm_matmul.triton.tiles import _TABLE, SparseTile


def test_one_tile_by_hand():
    cut = SparseTile(128, 128, 2, 2, 3)
    # Copies write 128 rows of 64 bytes of values and 8 of metadata, and 128 columns of 128 bytes:
    # 25600. Each of four warps reads 64 rows and 64 columns of them: 12800.
    assert sparse_tiles.count_shared_bytes(cut, "sparse") == 25600 + 4 * 12800
    sparse = count_cycles(cut, "sparse", products=1024, instructions=196)
    assert sparse == Cycles(128 * 128 * 64 / 2048, 600, 196)
    assert sparse.binding == "shared memory"
    # Rows of a dense operand have 128 bytes, and no metadata.
    dense = count_cycles(cut, "dense", products=1024, instructions=272)
    assert dense == Cycles(1024, (32768 + 4 * 16384) / 128, 272)
    assert dense.binding == "tensor cores"
    # Of eight warps, 4 x 2, two read the same rows and four the same columns.
    wide = SparseTile(256, 128, 4, 2, 4)
    assert sparse_tiles.count_shared_bytes(wide, "sparse") == 3 * 256 * 72 + 5 * 128 * 128


def test_a_copy_is_as_large_as_a_stage_of_the_ring():
    for capability in list_targets():
        for cut in list_tiles(capability):
            read = cut._replace(warps_along_rows=0, warps_along_columns=0)
            written = sparse_tiles.count_shared_bytes(read, "sparse")
            assert written * cut.stages == cut.shared_bytes


def test_every_device_has_a_rate_and_every_tile_of_the_table_a_row():
    assert RATES.keys() == aot.TARGETS.keys()
    assert {name: rate.products for name, rate in RATES.items() if not rate.is_assumed} == {
        "a100": 1024, "rtx3090": 256, "rtx4090": 256, "l40s": 512, "rtx5090": 256,
    }  # fmt: skip
    for capability in list_targets():
        row = _TABLE[capability]
        assert {row.product, row.wide_product} - {None} <= set(list_tiles(capability))


def test_the_committed_table_is_what_the_module_writes():
    counts = read_counts()
    table = sparse_tiles.TABLE.read_text()
    assert table == sparse_tiles.make_table(counts["instructions"])
    assert table.startswith("A prediction")
    assert table.count("\n| ") == 2 + sum(
        len(list_tiles(gpu.compute_capability)) for gpu in aot.TARGETS.values()
    )


def test_instructions_were_counted_of_the_kernels_as_they_are():
    run = "python -m benchmarks.sparse_tiles"
    assert read_counts()["source"] == hash_kernels("nm_matmul"), run


_SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], [R8.64] ;
.L_x_0:
        /*0040*/                   HMMA.SP.16832.F32.BF16 R100, R4, R12, R100, R8, 0x0 ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
"""


def test_instructions_of_the_loop_that_multiplies_are_counted():
    assert sparse_tiles.count_instructions(_SASS) == 5
    with pytest.raises(ValueError, match="there are 0"):
        sparse_tiles.count_instructions(_SASS.replace("HMMA", "IMMA"))
    with pytest.raises(ValueError, match="there are 2"):
        sparse_tiles.count_instructions(_SASS + _SASS.replace(".L_x_", ".L_x_1"))


def test_nothing_is_compiled_again_before_the_kernels_change(tmp_path, monkeypatch):
    compiled = []

    def compile_loop(*loop):
        compiled.append(loop)
        return len(compiled)

    monkeypatch.setattr(sparse_tiles, "COUNTS", tmp_path / "counts.json")
    monkeypatch.setattr(sparse_tiles, "TABLE", tmp_path / "table.md")
    monkeypatch.setattr(sparse_tiles, "compile_loop", compile_loop)
    assert sparse_tiles.main() == sparse_tiles.main() == 0
    count = len(compiled)
    assert read_counts()["instructions"].keys() == {sparse_tiles.name_loop(*x) for x in compiled}
    monkeypatch.setattr(sparse_tiles, "hash_kernels", lambda op: "other")
    sparse_tiles.main()
    assert len(compiled) == 2 * count > 40


@pytest.mark.ci
@pytest.mark.parametrize("operand", ["sparse", "dense"])
def test_a_sample_is_compiled_to_what_was_counted(operand):
    pytest.importorskip("jax_triton")
    counts, capability = read_counts(), (8, 0)
    if counts["versions"] != find_versions():
        pytest.skip(f"instructions were counted with {counts['versions']}")
    cut = list_tiles(capability)[0]
    name = sparse_tiles.name_loop(cut, operand, capability)
    assert sparse_tiles.compile_loop(cut, operand, capability) == counts["instructions"][name]
