"""What the records of the attention benchmark say: a table, shares, a plot, and targets."""

import pathlib
from collections.abc import Sequence

from benchmarks.attention_problems import Problem
from benchmarks.attention_torch import FLEX, SDPA
from benchmarks.records import Column
from benchmarks.targets import Record, Target, evaluate, times_faster

HOPPER, TRITON = "mosaic_sm90", "triton"
# Dense bf16 of an H100 or H200 SXM, from NVIDIA's data sheets, without sparsity.
PEAK_TFLOPS = 989.0


def share_of_cudnn(record: Record, name: str) -> float | None:
    """Return the rate of a function as a share of cuDNN's dense rate in the same point.

    rate = operations in kept blocks / time; cuDNN keeps every visible block.

    Args:
      record: of one point.
      name: str, the function.

    Returns:
      float, or None if one of the two was not measured.
    """
    rates = [record["values"].get(n, {}).get("tflops_per_second") for n in (name, "cudnn")]
    return None if None in rates else rates[0] / rates[1]


def read_problem(record: Record) -> Problem:
    """Return the setting that a record measured.

    Args:
      record: of one point.
    """
    return Problem(**{name: value for name, value in record["key"].items() if name != "device"})


def _milliseconds(name):
    return lambda record: f"{1e3 * record['values'][name]['median_seconds']:.1f}"


def _fine_milliseconds(name):
    return lambda record: f"{1e3 * record['values'][name]['median_seconds']:.3f}"


def _megabytes(name):
    return lambda record: f"{record['values'][name]['temp_bytes'] / 1e6:.0f}"


def _tflops(name, digits):
    return lambda record: f"{record['values'][name]['tflops_per_second']:.{digits}f}"


def _percent(share):
    def cell(record):
        value = share(record)
        return None if value is None else f"{100 * value:.0f} %"

    return cell


def _speedup(record):
    seconds = {
        name: value["median_seconds"]
        for name, value in record["values"].items()
        if "median_seconds" in value and name not in (HOPPER, TRITON, FLEX)
    }
    own = seconds.pop("xla")
    return f"{min(seconds.values()) / own:.1f}x" if seconds else None


def _share_of_sdpa(record):
    rates = [record["values"].get(n, {}).get("tflops_per_second") for n in ("xla", SDPA)]
    return None if None in rates else rates[0] / rates[1]


def _setting(name):
    return lambda record: str(record["key"][name])


COLUMNS = (
    Column("B x N x H", lambda r: "{batch} x {heads} x {head_dim}".format(**r["key"])),
    *(Column(n, _setting(n)) for n in ("length", "block", "pattern", "causal", "dtype")),
    Column("kept", lambda r: f"{read_problem(r).kept_share():.3f}"),
    Column("pass", lambda r: "forward + backward" if r["key"]["backward"] else "forward"),
    Column("Hopper ms", _fine_milliseconds(HOPPER), optional=True),
    Column("Triton ms", _fine_milliseconds(TRITON), optional=True),
    Column("xla ms", _milliseconds("xla")),
    Column("hand-written ms", _milliseconds("hand-written"), optional=True),
    Column("jax.nn ms", _milliseconds("jax.nn")),
    Column("cuDNN ms", _fine_milliseconds("cudnn"), optional=True),
    Column("Flex ms", _fine_milliseconds(FLEX), optional=True),
    Column("SDPA ms", _fine_milliseconds(SDPA), optional=True),
    Column("schedule ms", _fine_milliseconds("schedule"), optional=True),
    Column("Hopper TFLOP/s", _tflops(HOPPER, 0), optional=True),
    Column("of cuDNN's rate", _percent(lambda r: share_of_cudnn(r, HOPPER)), optional=True),
    Column("Triton TFLOP/s", _tflops(TRITON, 0), optional=True),
    Column("Triton of cuDNN's rate", _percent(lambda r: share_of_cudnn(r, TRITON)), optional=True),
    Column(
        "of peak",
        _percent(lambda r: r["values"][HOPPER]["tflops_per_second"] / PEAK_TFLOPS),
        optional=True,
    ),
    Column("xla against fastest dense", _speedup),
    Column("xla TFLOP/s", _tflops("xla", 3)),
    Column("of SDPA's rate", _percent(_share_of_sdpa), optional=True),
    Column("xla MB", _megabytes("xla")),
    Column("jax.nn MB", _megabytes("jax.nn")),
)


def _where(chosen, value):
    return lambda record: value(record) if chosen(read_problem(record)) else None


def _is_large(problem):
    """Whether the problem is of the shape that the kernels were made for."""
    return problem.block == 128 and problem.head_dim == 128 and problem.length >= 4096


TARGETS = (
    Target(
        "forward: at least 65 % of cuDNN's dense rate, blocks 128 x 128, H = 128, L >= 4096",
        _where(lambda p: _is_large(p) and not p.backward, lambda r: share_of_cudnn(r, HOPPER)),
        lambda share: share >= 0.65,
    ),
    Target(
        "forward + backward: at least 60 % of cuDNN's dense rate, same shapes",
        _where(lambda p: _is_large(p) and p.backward, lambda r: share_of_cudnn(r, HOPPER)),
        lambda share: share >= 0.60,
    ),
    Target(
        "faster than FlexAttention at every density",
        lambda r: times_faster(r, HOPPER, FLEX),
        lambda ratio: ratio > 1.0,
    ),
    Target(
        "no slower than dense cuDNN up to density 0.6, same shapes",
        _where(
            lambda p: _is_large(p) and p.pattern == "random" and p.density == 0.6,
            lambda r: times_faster(r, HOPPER, "cudnn"),
        ),
        lambda ratio: ratio >= 1.0,
    ),
    Target(
        "the schedule takes less than 2 % of its attention",
        lambda r: times_faster(r, HOPPER, "schedule"),
        lambda share: share < 0.02,
        max,
    ),
    Target(
        "Triton faster than FlexAttention at every density up to 0.7",
        _where(lambda p: p.kept_share() <= 0.7, lambda r: times_faster(r, TRITON, FLEX)),
        lambda ratio: ratio > 1.0,
    ),
    Target(
        "Triton forward: at least 50 % of cuDNN's dense rate, blocks 128 x 128, H = 128, L >= 4096",
        _where(lambda p: _is_large(p) and not p.backward, lambda r: share_of_cudnn(r, TRITON)),
        lambda share: share >= 0.50,
    ),
    Target(
        "Triton forward + backward: at least 45 % of cuDNN's dense rate, same shapes",
        _where(lambda p: _is_large(p) and p.backward, lambda r: share_of_cudnn(r, TRITON)),
        lambda share: share >= 0.45,
    ),
)


def evaluate_targets(records: Sequence[Record]) -> str:
    """Say of each target whether the records meet it.

    A target is met on a device if every one of its points there meets it.

    Args:
      records: of all devices.

    Returns:
      str, a line per target, and per device where the target was measured.
    """
    return evaluate(TARGETS, records)


def collect_speedups(
    records: Sequence[Record], device: str
) -> tuple[str, dict[str, dict[float, float]]]:
    """Collect speed-ups over dense attention by density, from the largest comparable set.

    Points are comparable if they differ in density and nothing else; a point whose pattern is
    "full" belongs to the random ones, as density 1. Dense is the first of cuDNN, PyTorch's SDPA and
    `jax.nn` that was measured at every density.

    Args:
      records: of all devices.
      device: str, the one to look at.

    Returns:
      tuple of what dense is, and dict name -> density -> speed-up, ascending densities; empty if no
      set has three densities.
    """
    sets: dict[tuple, dict[float, Record]] = {}
    for record in records:
        problem = read_problem(record)
        if record["key"]["device"] != device or problem.measure != "attention":
            continue
        if problem.pattern not in ("random", "full"):
            continue
        density = 1.0 if problem.pattern == "full" else problem.density
        settings = {**problem.key(), "density": density, "pattern": "random"}
        del settings["density"]
        sets.setdefault(tuple(settings.items()), {})[density] = record
    largest = max(sets.values(), key=len, default={})
    if len(largest) < 3:
        return "", {}
    dense = next(
        (
            name
            for name in ("cudnn", SDPA)
            if all("median_seconds" in r["values"].get(name, {}) for r in largest.values())
        ),
        "jax.nn",
    )
    lines: dict[str, dict[float, float]] = {}
    for density, record in sorted(largest.items()):
        for name in record["values"]:
            speedup = None if name == dense else times_faster(record, name, dense)
            if speedup is not None:
                lines.setdefault(name, {})[density] = speedup
    return dense, lines


def plot_speedups(records: Sequence[Record], device: str, path: pathlib.Path) -> str:
    """Plot speed-up over dense attention against density, a line per implementation.

    Args:
      records: of all devices.
      device: str, the one to plot.
      path: of the PNG file.

    Returns:
      str, what was written, or why nothing was.
    """
    dense, lines = collect_speedups(records, device)
    if not lines:
        return f"{path.name} not drawn: needs three densities measured on {device}"
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"{path.name} not drawn: matplotlib is not installed"
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="share of the blocks kept",
        ylabel=f"times as fast as {dense}, which is dense",
        xscale="log",
        yscale="log",
        title=device,
    )
    densities = sorted({density for speedups in lines.values() for density in speedups})
    axes.set_xticks(densities, [f"{density:g}" for density in densities])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    for name, speedups in lines.items():
        axes.plot(list(speedups), list(speedups.values()), marker="o", label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.legend()
    FigureCanvasAgg(figure).print_png(path)
    return f"{path} drawn"
