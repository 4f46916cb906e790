"""The test of the cache reads the tiles it says, and compiles for a GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks import l2_bandwidth
from benchmarks.l2_bandwidth import read_tiles, read_tiles_reference
from pallas_kernels import aot
from pallas_kernels.doctor.oracles import error, make_normal
from tests.kernels.interpreter import hopper
from tests.kernels.machine_checks import check_kernel


@pytest.mark.ci
def test_every_program_reads_its_tiles_in_turns():
    (x,) = make_normal(((l2_bandwidth.ROWS * 7, 64),), "bfloat16")
    options = dict(num_programs=2, tiles_of_program=20)
    with hopper("late"):
        got = jax.jit(functools.partial(read_tiles, **options))(x)
    assert error(got, read_tiles_reference(x, **options)) < 1e-5


@pytest.mark.ci
def test_it_compiles_for_a_gpu_to_copies_and_little_else():
    x = jax.ShapeDtypeStruct((l2_bandwidth.ROWS * 512, 64), jnp.bfloat16)
    report = aot.compile_for(
        functools.partial(read_tiles, num_programs=132, tiles_of_program=2048), x
    )
    (kernel,) = report.kernels
    check_kernel(kernel)
    assert (
        "UTMALDG" in kernel.sass
        and kernel.shared_memory_bytes >= l2_bandwidth.STAGES * l2_bandwidth.TILE_BYTES
    )


def test_without_a_gpu_it_says_so(capfd):
    assert l2_bandwidth.main([]) == 2
    assert "found none" in capfd.readouterr().err
