"""What the records of the benchmark of N:M products say: a table and targets."""

from collections.abc import Callable, Sequence

from benchmarks.nm_matmul_problems import Problem
from benchmarks.nm_matmul_torch import CUSPARSELT
from benchmarks.records import Column
from benchmarks.targets import Record, Target, evaluate, times_faster
from pallas_kernels import aot

HOPPER, TRITON, XLA, DENSE = "mosaic_sm90", "triton", "xla", "dense"
# Dense as well, by the kernel of `TRITON` with the same tile.
OWN_DENSE = "dense_triton"
_TIMED = {
    "Hopper": HOPPER, "Triton": TRITON, "xla": XLA, "dense": DENSE, "dense Triton": OWN_DENSE,
    "cuSPARSELt": CUSPARSELT,
}  # fmt: skip
_KERNELS = {title: _TIMED[title] for title in ("Hopper", "Triton", "xla")}


def read_problem(record: Record) -> Problem:
    """Return the setting that a record measured.

    Args:
      record: of one point.
    """
    return Problem(**{name: value for name, value in record["key"].items() if name != "device"})


def packing_floor_seconds(record: Record) -> float | None:
    """Return the time that the memory of the device needs for what packing has to move.

    Args:
      record: of one point.

    Returns:
      float, or None if it is no packing or the memory's bandwidth is not known here.
    """
    problem = read_problem(record)
    if problem.measure != "pack":
        return None
    for gpu in (aot.H200, aot.H100):
        if record["key"]["device"].startswith(gpu.name.split(" 80GB")[0]):
            return problem.packing_bytes() / gpu.memory_bytes_per_second
    return None


def _microseconds(name):
    return lambda record: f"{1e6 * record['values'][name]['median_seconds']:.1f}"


def _tflops(name):
    def cell(record):
        rate = record["values"][name]["tflops_per_second"]
        return f"{rate:.0f}" if rate >= 10 else f"{rate:.3f}"

    return cell


def _megabytes(name):
    return lambda record: f"{record['values'][name]['temp_bytes'] / 1e6:.0f}"


def _gigabytes_per_second(name):
    def cell(record):
        problem = read_problem(record)
        seconds = record["values"][name]["median_seconds"]
        return f"{problem.packing_bytes() / seconds / 1e9:.3g}" if _is_packing(problem) else None

    return cell


def _is_packing(problem):
    return problem.measure == "pack"


def _floor(record):
    seconds = packing_floor_seconds(record)
    return None if seconds is None else f"{1e6 * seconds:.1f}"


def _ratio(name, peer):
    def cell(record):
        ratio = times_faster(record, name, peer)
        return None if ratio is None else f"{ratio:.2f}x"

    return cell


def _option(name):
    return lambda record: record["key"].get(name)


COLUMNS = (
    Column("measure", lambda r: r["key"]["measure"]),
    Column("tokens", lambda r: None if _is_packing(read_problem(r)) else str(r["key"]["rows"])),
    Column("K x N", lambda r: "{inner} x {columns}".format(**r["key"])),
    *(Column(n.replace("_", " "), _option(n)) for n in ("activation", "grad_pruning", "dtype")),
    *(Column(f"{t} us", _microseconds(n), optional=n != DENSE) for t, n in _TIMED.items()),
    *(Column(f"{t} TFLOP/s", _tflops(n), optional=n != DENSE) for t, n in _TIMED.items()),
    *(Column(f"{t} against dense", _ratio(n, DENSE), optional=True) for t, n in _KERNELS.items()),
    Column("Triton against dense Triton", _ratio(TRITON, OWN_DENSE), optional=True),
    *(
        Column(f"{title} against cuSPARSELt", _ratio(_KERNELS[title], CUSPARSELT), optional=True)
        for title in ("Hopper", "Triton")
    ),
    *(Column(f"{t} GB/s", _gigabytes_per_second(n), optional=True) for t, n in _KERNELS.items()),
    Column("floor us", _floor, optional=True),
    *(Column(f"{t} MB", _megabytes(n), optional=True) for t, n in _KERNELS.items()),
    Column("dense MB", _megabytes(DENSE)),
)


def _where(
    chosen: Callable[[Problem], bool], value: Callable[[Record], float | None]
) -> Callable[[Record], float | None]:
    return lambda record: value(record) if chosen(read_problem(record)) else None


def _is_large_product(problem):
    return problem.measure == "gemm" and min(problem.rows, problem.inner, problem.columns) >= 4096


def _against_own_dense(record):
    capability = record["environment"].get("compute_capability", "")
    is_meant = capability == "9.0" or capability.startswith("8.")
    return times_faster(record, TRITON, OWN_DENSE) if is_meant else None


TARGETS = (
    Target(
        "product at least 1.5x cuBLAS, 4096 x 4096 x 4096 and above",
        _where(_is_large_product, lambda r: times_faster(r, HOPPER, DENSE)),
        lambda ratio: ratio >= 1.5,
    ),
    Target(
        "product at least as fast as cuSPARSELt, same shapes",
        _where(_is_large_product, lambda r: times_faster(r, HOPPER, CUSPARSELT)),
        lambda ratio: ratio >= 1.0,
    ),
    Target(
        "packing 4096 x 4096 along both axes in less than 25 us",
        _where(
            lambda p: _is_packing(p) and (p.inner, p.columns) == (4096, 4096),
            lambda r: r["values"].get(HOPPER, {}).get("median_seconds"),
        ),
        lambda seconds: seconds < 25e-6,
        max,
    ),
    Target(
        "FFN forward + backward with packing and MVUE at least 1.3x dense, width >= 2048",
        _where(
            lambda p: p.measure == "ffn" and p.grad_pruning == "mvue" and p.inner >= 2048,
            lambda r: times_faster(r, HOPPER, DENSE),
        ),
        lambda ratio: ratio >= 1.3,
    ),
    Target(
        "`triton` at least 1.3x its own dense kernel of the same tile, 4096 x 4096 x 4096 and "
        "above, compute capability 8 and 9.0",
        _where(_is_large_product, _against_own_dense),
        lambda ratio: ratio >= 1.3,
    ),
)


def evaluate_targets(records: Sequence[Record]) -> str:
    """Say of each target whether the records meet it.

    Args:
      records: of all devices.

    Returns:
      str, a line per target, and per device where the target was measured.
    """
    return evaluate(TARGETS, records)
