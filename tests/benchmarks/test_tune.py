"""Tiles are tuned on what the kernels run, and come out as rows of the tables."""

import functools

import jax
import numpy as np
import pytest

from benchmarks import tune, tune_kernels
from benchmarks.harness import measure_case
from pallas_kernels import aot
from pallas_kernels.doctor.timing import relative_error
from pallas_kernels.triton.interpretation import interpret_with
from tests.kernels.triton_interpreter import triton_kernels


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
def test_candidates_fit_the_device(capability):
    with interpret_with(lambda *_: (), capability):
        kernels = tune_kernels.list_kernels(capability)
    keys = [(kernel.op, kernel.key, kernel.tile) for kernel in kernels]
    assert len(set(keys)) == len(keys)
    limits = [
        gpu.shared_memory_per_block_bytes
        for gpu in aot.TARGETS.values()
        if gpu.compute_capability == capability
    ]
    for kernel in kernels:
        assert len(set(kernel.candidates)) == len(kernel.candidates) >= 3
        for cut in kernel.candidates:
            if kernel.op == "block_sparse_matmul":
                itemsize = int(kernel.key)
                staged = (cut.rows + cut.columns) * cut.depth * itemsize * cut.stages
                assert staged < min(limits)


def test_one_op_may_be_tuned_alone():
    with interpret_with(lambda *_: (), (8, 0)):
        kernels = tune_kernels.list_kernels((8, 0))
    assert {kernel.op for kernel in kernels} == set(tune_kernels.TUNED_OPS)
    with pytest.raises(SystemExit):
        tune.main(["--op=pack_nm"])


_SMALL = {
    "attention": functools.partial(tune_kernels._list_attention, head_dim=64, length=256, heads=1),
    "map": functools.partial(tune_kernels._list_map, head_dim=64, length=160, heads=2),
    "block_matmul": functools.partial(tune_kernels._list_block_matmul, tokens=64, shape=(256, 256)),
}


@pytest.mark.ci
@pytest.mark.parametrize("name", _SMALL)
def test_another_tile_gives_the_same_result(name):
    with triton_kernels():
        for kernel in _SMALL[name]((8, 0), dtype="bfloat16"):
            arguments = kernel.make()
            cuts = kernel.default, max(kernel.candidates, key=lambda c: (c.rows, -c.columns))
            assert cuts[0][:2] != cuts[1][:2]
            first, second = (kernel.run(cut, *arguments) for cut in cuts)
            assert relative_error(second, first) < 1e-2


@pytest.mark.ci
def test_another_tile_finds_the_same_masks():
    with triton_kernels():
        (kernel,) = tune_kernels._list_transposable((8, 0), shape=(16, 400))
        arguments = kernel.make()
        masks = {cut: np.asarray(kernel.run(cut, *arguments)) for cut in kernel.candidates}
    assert kernel.default in masks
    for mask in masks.values():
        np.testing.assert_array_equal(mask, masks[kernel.default])


def test_rows_name_the_fastest_tile_of_each_kernel():
    def record(tile, seconds, device="a"):
        values = {name: {"median_seconds": s} for name, s in seconds.items()}
        key = {"op": "op", "capability": "8.0", "key": "(2, 64)", "tile": tile, "device": device}
        return {"key": key, "values": values | {"broken": {"failed": "error"}}}

    records = [
        record("forward", {"Tile(1)": 2.0, "Tile(2)": 1.0}),
        record("queries", {"Tile(3)": 1.0}),
        record("forward", {"Tile(4)": 1.0}, device="b"),
    ]
    assert "(2, 64): forward=Tile(2), queries=Tile(3)\n" in tune.describe_rows(records, "a")
    assert tune.describe_rows(records, "c") == ""


def test_the_tile_of_the_table_is_timed_beside_the_candidates():
    cuts = tuple(tune_kernels.Tile(rows, 16, 4, 2) for rows in (16, 32))
    kernel = tune_kernels.Kernel(
        "op", "forward", "2", cuts[0], cuts, lambda: (np.float32(2),), lambda cut, x: x * 3
    )
    values = measure_case(tune.make_case(kernel), repeats=1, sample_seconds=0.001)
    assert values.keys() == {"Tile(16, 16, 4, 2)", "Tile(32, 16, 4, 2)"}
    assert all("median_seconds" in value for value in values.values())


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert tune.main([]) == 2
    assert "tiles are timed on a GPU: " in capsys.readouterr().err
