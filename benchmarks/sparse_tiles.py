"""Which part of a GPU should bind the 2:4 products in Triton? A prediction: nothing is timed.

    PYTHONPATH=.venv/compile JAX_PLATFORMS=cpu python -m benchmarks.sparse_tiles

For every GPU of `gpu_targets.toml` and every tile that it gets, the cycles are counted that a step
of one program takes on one processor: 64 positions of the contraction, in bf16.

  tensor cores    multiplications, at the rate of the instruction;
  shared memory   bytes that copies write and that all warps read, at 128 bytes a cycle;
  issue           instructions of the main loop, all warps', at four a cycle.

The largest of the three binds, if all else is hidden behind it: memory, its caches and waits are
left out. The dense product by the same kernel and tile is counted as well, and so is what sparsity
should save. Instructions are counted in machine code, once for each version of the kernel.

B is read as y = x w and dx read it, by rows; dw reads it by columns, in more instructions.

Letters: R rows of the sparse operand, P columns of the dense one
"""

import functools
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from benchmarks.compiled_kernels import find_versions, hash_kernels, list_targets
from benchmarks.harness import RESULTS
from benchmarks.nm_matmul_functions import fit_dense
from pallas_kernels import aot
from pallas_kernels.nm_matmul.packing import TILE, Compressed
from pallas_kernels.nm_matmul.triton.products import multiply, multiply_dense
from pallas_kernels.nm_matmul.triton.tiles import SparseTile, find_product_tile

COUNTS, TABLE = RESULTS / "sparse_tiles.json", RESULTS / "sparse_tiles.md"
SPARSE, DENSE = "sparse", "dense"
# 32 banks of four bytes (CUDA C++ Programming Guide, "Shared Memory").
_SHARED_BYTES = 128
# A processor has four, each with an instruction a cycle (the same, "Compute Capability 8.x").
_SCHEDULERS = 4
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")


class Rate(NamedTuple):
    """What the tensor cores of one processor do in a cycle.

    Attributes:
      products: int, dense, of bf16, added in f32. A sparse instruction is taken to cover twice as
        many in the same time.
      source: str, where the figure is from.
      is_assumed: bool, nobody says so: it is to be measured.
    """

    products: int
    source: str
    is_assumed: bool = False


def _derive(teraflops: float, name: str, where: str) -> Rate:
    """Return the rate behind a peak, to the nearest 64: documents round peaks and clocks."""
    gpu = aot.TARGETS[name]
    rate = teraflops * 1e12 / (2 * gpu.cores * gpu.clock_ghz * 1e9)
    source = f"{where}: {teraflops:g} TFLOP/s, {gpu.cores} processors, {gpu.clock_ghz} GHz"
    return Rate(64 * round(rate / 64), source)


_LEGACY = "No document gives the rate of `mma.sync` and `mma.sp`: that of an A100; `{}` is faster"
# Key of `aot.TARGETS` -> rate. GeForce cards add in f32 at half of the rate of f16.
RATES: Mapping[str, Rate] = {
    "h200": Rate(1024, _LEGACY.format("wgmma"), True),
    "h100": Rate(1024, _LEGACY.format("wgmma"), True),
    "a100": _derive(312, "a100", "A100 whitepaper"),
    "rtx3090": _derive(71, "rtx3090", "GA102 whitepaper"),
    "rtx4090": _derive(165.2, "rtx4090", "Ada whitepaper"),
    "l40s": _derive(362.05, "l40s", "L40S datasheet"),
    "b200": Rate(1024, _LEGACY.format("tcgen05"), True),
    "rtx5090": _derive(209.5, "rtx5090", "RTX Blackwell whitepaper"),
}


class Cycles(NamedTuple):
    """Cycles of one step of one program on one processor, for each part by itself."""

    tensor_cores: float
    shared_memory: float
    issue: float

    @property
    def binding(self) -> str:
        """Name of the part that takes longest."""
        names = ("tensor cores", "shared memory", "issue")
        return max(zip(self, names, strict=True))[1]


def list_tiles(capability: tuple[int, int]) -> list[SparseTile]:
    """List the tiles that products get on a device, the largest first.

    Args:
      capability: (major, minor).
    """
    found = {
        find_product_tile(capability, rows=rows, columns=columns, divides_columns=False)
        # Many tiles, few, and sides that a tile does not divide.
        for rows, columns in itertools.product((1 << 16, 128, 64), (1 << 16, 64))
    }
    return sorted(found, key=lambda cut: (-cut.rows, -cut.columns))


def count_shared_bytes(cut: SparseTile, operand: str) -> int:
    """Count what a step writes to shared memory, and what all warps read from it.

    Every warp reads the rows of A and the columns of B of its own sums: of warps that share rows,
    each reads them.

    Args:
      operand: "sparse" or "dense", the left one.
    """
    # Two bytes a value: half of a row, and a byte of positions for every eight; or all of it.
    row_bytes = TILE + TILE // 8 if operand == SPARSE else 2 * TILE
    left, right = cut.rows * row_bytes, cut.columns * 2 * TILE
    return left * (1 + cut.warps_along_columns) + right * (1 + cut.warps_along_rows)


def count_cycles(cut: SparseTile, operand: str, *, products: int, instructions: int) -> Cycles:
    """Count the cycles of a step.

    Args:
      operand: "sparse" or "dense", the left one.
      products: int, dense ones of a processor and cycle, see `Rate`.
      instructions: int, of one warp and step.
    """
    rate = products * (2 if operand == SPARSE else 1)
    return Cycles(
        cut.rows * cut.columns * TILE / rate,
        count_shared_bytes(cut, operand) / _SHARED_BYTES,
        cut.warps * instructions / _SCHEDULERS,
    )


def count_instructions(sass: str) -> int:
    """Count the instructions of the main loop: the innermost one that multiplies.

    Args:
      sass: as `nvdisasm` writes it.

    Raises:
      ValueError: if no loop multiplies, or there are several.
    """
    labels: dict[str, int] = {}
    code: list[str] = []
    loops = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            code.append(line)
            branch = _BRANCH.search(line)
            if branch and branch[1] in labels:
                loops.append(code[labels[branch[1]] :])
    sizes = [len(body) for body in loops if any("HMMA" in line for line in body)]
    if len(sizes) != 1:
        raise ValueError(f"one loop that multiplies is wanted, there are {len(sizes)}")
    return sizes[0]


def compile_loop(cut: SparseTile, operand: str, capability: tuple[int, int]) -> int:
    """Compile a product and count the instructions of its main loop.

    Args:
      operand: "sparse" or "dense", the left one.
      capability: (major, minor), of the device.
    """
    size = 4096

    def struct(*shape: int, dtype: str = "bfloat16") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    if operand == SPARSE:
        words = struct(size // TILE, size // TILE, 2 * TILE, dtype="uint32")
        run = functools.partial(multiply, cut=cut)
        left: Any = Compressed(struct(size, size // 2), words)
    else:
        run = functools.partial(multiply_dense, cut=fit_dense(cut, capability))
        left = struct(size, size)
    mesh = aot.make_gpu_mesh(list_targets()[capability][0])
    (kernel,) = aot.compile_triton_kernels(run, left, struct(size, size), mesh=mesh)
    return count_instructions(kernel.sass)


def _list_loops() -> Iterator[tuple[SparseTile, str, tuple[int, int]]]:
    for capability in list_targets():
        yield from (
            (cut, operand, capability)
            for cut, operand in itertools.product(list_tiles(capability), (SPARSE, DENSE))
        )


def name_loop(cut: SparseTile, operand: str, capability: tuple[int, int]) -> str:
    """Name a main loop as the counts do."""
    return f"{capability[0]}.{capability[1]} {operand} {cut}"


def read_counts() -> dict[str, Any]:
    """Read what was counted.

    Returns:
      dict: `source`, the hash of the kernels; `versions` of the compilers; `instructions` of each
      main loop, by the names of `name_loop`.
    """
    return json.loads(COUNTS.read_text())


def _update_counts() -> dict[str, Any]:
    """Return the counts, all compiled anew if they are of other kernels or compilers."""
    head = {"source": hash_kernels("nm_matmul"), "versions": find_versions()}
    wanted = {name_loop(*loop): loop for loop in _list_loops()}
    if COUNTS.exists():
        counts = read_counts()
        known = {name: counts[name] for name in head}
        if known == head and counts["instructions"].keys() == wanted.keys():
            return counts
    instructions = {}
    for name, loop in wanted.items():
        instructions[name] = compile_loop(*loop)
        print(f"{name}: {instructions[name]} instructions a step", flush=True)
    counts = {**head, "instructions": instructions}
    unfinished = COUNTS.with_suffix(".json.tmp")
    unfinished.write_text(json.dumps(counts, indent=1) + "\n")
    os.replace(unfinished, COUNTS)
    return counts


_COLUMNS = (
    "device", "tile R x P", "warps along R x P", "tensor cores", "shared memory", "issue", "binds",
    "share of the sparse peak", "dense: tensor cores", "shared memory", "issue", "binds",
    "dense / sparse", "dense / sparse without tensor cores",
)  # fmt: skip
_HEAD = """A prediction from counts, nothing was timed: cycles of one step of 64 positions of one
program on one processor, `python -m benchmarks.sparse_tiles`. The largest of three should bind. The
sparse peak is twice the dense rate below. The last column leaves the tensor cores out: the least
that sparsity should save whatever their rate, as long as a sparse instruction takes no longer than
a dense one of half its depth.
"""


def make_table(instructions: Mapping[str, int]) -> str:
    """Make the table and the list of rates.

    Args:
      instructions: of each main loop, by the names of `name_loop`.

    Returns:
      str in Markdown.
    """
    rows: list[tuple[str, ...]] = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for target, gpu in aot.TARGETS.items():
        for cut in list_tiles(gpu.compute_capability):
            sparse, dense = (
                count_cycles(
                    cut,
                    operand,
                    products=RATES[target].products,
                    instructions=instructions[name_loop(cut, operand, gpu.compute_capability)],
                )
                for operand in (SPARSE, DENSE)
            )
            rows.append(
                (
                    _name(target),
                    f"{cut.rows} x {cut.columns}",
                    f"{cut.warps_along_rows} x {cut.warps_along_columns}",
                    *_write(sparse),
                    f"{sparse.tensor_cores / max(sparse):.0%}",
                    *_write(dense),
                    f"{max(dense) / max(sparse):.2f}x",
                    f"{max(dense[1:]) / max(sparse[1:]):.2f}x",
                )
            )
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    rates = "".join(
        f"- {_name(target)}: {'assumed, ' if rate.is_assumed else ''}{rate.products}. "
        f"{rate.source}.\n"
        for target, rate in RATES.items()
    )
    title = "Dense products of bf16, added in f32, of a processor and cycle:"
    return f"{_HEAD}\n{table}\n{title}\n\n{rates}"


def _name(target: str) -> str:
    return aot.TARGETS[target].name.removeprefix("NVIDIA ")


def _write(cycles: Cycles) -> tuple[str, ...]:
    return (*(f"{value:.0f}" for value in cycles), cycles.binding)


def main() -> int:
    """Count what is missing, write and print the table.

    Returns:
      int, exit code: 0.
    """
    table = make_table(_update_counts()["instructions"])
    TABLE.write_text(table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
