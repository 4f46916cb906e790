"""How fast do a GPU's processors read tiles from the second-level cache into shared memory?

    python -m benchmarks.l2_bandwidth [--headline] [--force] [--budget-seconds=N]

Every processor copies tiles of 256 rows and 128 bytes one after another, as the kernels do, and
computes nothing. Of an array that fits in the cache, that is the rate that bounds a kernel whose
operands are read by many processors; of a larger one, that of the memory. The models of the
kernels' speed assume 30 to 35 bytes for each processor and cycle.
"""

import functools
import sys
from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from benchmarks.harness import Case, Point, parse_arguments, run_points
from benchmarks.records import Column
from pallas_kernels.dispatch import count_processors
from pallas_kernels.doctor.timing import make_random

ROWS, COLUMNS = 256, 64
TILE_BYTES = 2 * ROWS * COLUMNS
# 160 KB on their way to each processor.
STAGES = 5
# 64 MB for each processor.
TILES_OF_PROGRAM = 2048
MEGABYTES = (4, 16, 32, 256)


def read_tiles(x: jax.Array, *, num_programs: int, tiles_of_program: int) -> jax.Array:
    """Copy tiles to shared memory and add up one row of each.

    Program p copies tiles p, p + num_programs, ... and begins anew at the end of the array.

    Args:
      x: bf16[256 tiles, 64].
      num_programs: int, programs, one for each processor.
      tiles_of_program: int, how many each of them copies; at least 5.

    Returns:
      f32[num_programs, 64], sums of the first rows.
    """
    num_tiles = x.shape[0] // ROWS

    def kernel(x_gmem, out_gmem, ring, full):
        program = lax.axis_index("program")

        def copy(index):
            tile = lax.rem(program + index * num_programs, jnp.int32(num_tiles))
            slot = lax.rem(index, jnp.int32(STAGES))
            rows = pl.ds(pl.multiple_of(tile * ROWS, ROWS), ROWS)
            plgpu.copy_gmem_to_smem(x_gmem.at[rows], ring.at[slot], full.at[slot])

        for index in range(STAGES):
            copy(jnp.int32(index))

        def take(index, total):
            slot = lax.rem(index, jnp.int32(STAGES))
            plgpu.barrier_wait(full.at[slot])
            total += plgpu.load(ring.at[slot, 0], layout=layout).astype(jnp.float32)
            # All threads have read before the next copy is started.
            plgpu.commit_smem()

            @pl.when(index + STAGES < tiles_of_program)
            def _():
                copy(index + STAGES)

            return total

        layout = plgpu.Layout.WGMMA.reduce(0)
        zeros = plgpu.layout_cast(jnp.zeros((COLUMNS,), jnp.float32), layout)
        out_gmem[program] = lax.fori_loop(0, tiles_of_program, take, zeros)

    kernel.__name__ = "read_tiles"
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_programs, COLUMNS), jnp.float32),
        scratch_types=[
            plgpu.SMEM((STAGES, ROWS, COLUMNS), x.dtype),
            plgpu.Barrier(num_barriers=STAGES),
        ],
        grid=(num_programs,),
        grid_names=("program",),
    )(x)


def read_tiles_reference(x: jax.Array, *, num_programs: int, tiles_of_program: int) -> jax.Array:
    """Add up the same rows in plain JAX.

    Args:
      x: bf16[256 tiles, 64].

    Returns:
      f32[num_programs, 64].
    """
    read = jnp.arange(tiles_of_program) * num_programs + jnp.arange(num_programs)[:, None]
    first_rows = x.reshape(-1, ROWS, COLUMNS)[:, 0].astype(jnp.float32)
    return first_rows[read % first_rows.shape[0]].sum(axis=1)


def make_case(megabytes: int) -> Case:
    """Make the case of one array.

    Args:
      megabytes: int, size of the array.
    """
    options = dict(num_programs=count_processors(), tiles_of_program=TILES_OF_PROGRAM)
    x = make_random(
        jax.ShapeDtypeStruct((megabytes * 10**6 // TILE_BYTES * ROWS, COLUMNS), "bfloat16")
    )
    return Case(
        functions={"copies": functools.partial(read_tiles, **options)},
        args=(x,),
        reference=functools.partial(read_tiles_reference, **options),
        tolerance=1e-4,
    )


def _rate(record) -> float:
    key, copies = record["key"], record["values"]["copies"]
    return key["processors"] * key["tiles"] * TILE_BYTES / copies["median_seconds"]


TABLE = (
    Column("array, MB", lambda r: str(r["key"]["megabytes"])),
    Column("GB/s", lambda r: f"{_rate(r) / 1e9:.0f}"),
    Column(
        "bytes a nanosecond and processor",
        lambda r: f"{_rate(r) / 1e9 / r['key']['processors']:.1f}",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the arrays that are missing, write and print the table.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if the right tiles were read, 2 without a GPU.
    """
    parsed = vars(parse_arguments((__doc__ or "").splitlines()[0], arguments))
    parsed.pop("headline")
    if jax.default_backend() != "gpu":
        print("the second-level cache of a GPU needs a GPU, found none", file=sys.stderr)
        return 2
    points = [
        Point(
            key={
                "megabytes": megabytes,
                "processors": count_processors(),
                "tiles": TILES_OF_PROGRAM,
            },
            make_case=functools.partial(make_case, megabytes),
        )
        for megabytes in MEGABYTES
    ]
    return 1 if run_points("l2_bandwidth", points, TABLE, **parsed) else 0


if __name__ == "__main__":
    sys.exit(main())
