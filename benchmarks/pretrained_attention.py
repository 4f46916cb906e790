"""Which blocks of attention does a pretrained model need, and who finds them?

    python -m benchmarks.pretrained_attention [--headline] [--force] [--budget-seconds=N]

SmolLM2-135M, which was trained with dense attention, reads four documents of 2,048 tokens through
the blocks of each pattern, without training. Fixed patterns know nothing, learned ones have seen
four other documents, "habits alone" and "dynamic" are calibrated by these, "dynamic" chooses from
the document itself and causally, "lookahead" too but from the queries of the block itself, and the
oracles keep the highest of the dense model's own maps of the document. All keep as many blocks.

Losses of every token are kept (`results/pretrained_attention.npz`, in units of 1e-4 nats), so that
patterns are compared token by token. Errors are those of means over chunks of 64 tokens, 95 %.
Forward passes are timed on one document, all patterns in turns (`pretrained_attention_speed.json`).

Legend: T positions.
"""

import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.environment import describe_environment, device_name
from benchmarks.harness import RESULTS, parse_arguments
from benchmarks.pretrained_documents import list_documents
from benchmarks.pretrained_patterns import (
    FREE_ORACLE,
    ORACLE,
    PATTERNS,
    SINK_WINDOW,
    measure_maps,
)
from benchmarks.pretrained_setting import DENSE, Setting
from benchmarks.records import Column, Results, make_table
from benchmarks.smollm2 import load_smollm2

NAME, LENGTH = "pretrained_attention", 2048
SPEED = f"{NAME}_speed"
SETTINGS = ((64, 0.2), (32, 0.2), (32, 0.1), (32, 0.3), (64, 0.3))
_CHUNK = 64
_UNIT = 1e-4
_ROUNDS = 3


class Losses:
    """Losses of tokens by pattern and document, kept in one file."""

    def __init__(self, path: pathlib.Path):
        """Read the file if it exists.

        Args:
          path: of an npz file.
        """
        self.path = path
        self._arrays = dict(np.load(path)) if path.exists() else {}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name] * _UNIT

    def record(self, name: str, losses_T: np.ndarray) -> None:
        """Keep the losses of one document, rounded, and write the file.

        Args:
          name: of pattern and document.
          losses_T: f32[T - 1], nats.
        """
        self._arrays[name] = np.rint(losses_T / _UNIT).astype(np.int32)
        np.savez_compressed(self.path, **self._arrays)


class Comparison(NamedTuple):
    """A mean difference of two patterns' losses, and the half-width of its 95 % interval."""

    mean: float
    half_width: float


def compare(losses: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> Comparison:
    """Compare two patterns token by token.

    Args:
      losses: f32[T - 1] of each document.
      others: likewise, of the pattern that is subtracted.

    Returns:
      Comparison in nats a token; chunks of tokens count as independent.
    """
    chunks = []
    for loss_T, other_T in zip(losses, others, strict=True):
        difference_T = loss_T - other_T
        count = len(difference_T) // _CHUNK
        chunks.append(difference_T[: count * _CHUNK].reshape(count, _CHUNK).mean(-1))
    means = np.concatenate(chunks)
    every = np.concatenate([a - b for a, b in zip(losses, others, strict=True)])
    error = means.std(ddof=1) / np.sqrt(len(means))
    return Comparison(float(every.mean()), float(1.96 * error))


def measure_losses(
    setting: Setting,
    results: Results,
    losses: Losses,
    *,
    force: bool,
    is_late: Callable[[], bool],
) -> None:
    """Read all documents through all patterns of a setting.

    Args:
      setting: with SmolLM2.
      results: file that summaries go to.
      losses: file that losses go to.
      force: measure again what is there.
      is_late: says when to stop.
    """
    for pattern in (DENSE, *dict.fromkeys(PATTERNS)):
        for index in setting.tests:
            document = setting.documents[index]
            key = {
                "pattern": pattern,
                "block": 0 if pattern == DENSE else setting.block_size,
                "density": 1.0 if pattern == DENSE else setting.density,
                "document": document.name,
                "device": device_name(),
            }
            if is_late() or (key in results and not force):
                continue
            began = time.perf_counter()
            reading = setting.prepare(pattern, index)
            loss_T = np.asarray(reading.compute())
            losses.record(name_losses(key), loss_T)
            values = {
                "loss": float(loss_T.mean()),
                "kept": reading.kept,
                "sha256": document.sha256,
            }
            if reading.share is not None:
                values["attention_kept"] = reading.share
            results.record(key, values, describe_environment())
            took = time.perf_counter() - began
            print(f"{key}: {values}, {took:.0f} s", flush=True)


def measure_speed(
    setting: Setting, results: Results, *, force: bool, is_late: Callable[[], bool]
) -> None:
    """Time all patterns of a setting in turns, on its first document.

    Args:
      setting: with SmolLM2.
      results: file that seconds of a forward pass go to, pattern by pattern.
      force: measure again what is there.
      is_late: says when to stop.
    """
    sizes = {"block": setting.block_size, "density": setting.density}
    key = sizes | {"device": device_name()}
    if is_late() or (key in results and not force):
        return
    names = (DENSE, *dict.fromkeys(PATTERNS))
    calls = {name: setting.prepare(name, setting.tests[0]).compute for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    # Calls last seconds: what one leaves in caches is nothing to the next. The first compile.
    for _ in range(1 + _ROUNDS):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            samples[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(found[1:]) for name, found in samples.items()}
    results.record(key, seconds, describe_environment())
    print(f"{key}: {seconds}", flush=True)


def name_losses(key: Mapping[str, Any]) -> str:
    """Return the name of one document's losses in the file."""
    return f"{key['pattern']}|{key['block']}|{key['density']}|{key['document']}"


def summarise(results: Results, losses: Losses, speed: Results) -> list[dict[str, Any]]:
    """Compare the patterns of each setting over its documents.

    Args:
      results: with at least the dense losses of a document.
      losses: of the same.
      speed: seconds of the settings that were timed.

    Returns:
      list of records, as `make_table` takes them, patterns in order of their loss.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for record in results.records:
        key = record["key"]
        groups.setdefault((key["block"], key["density"], key["pattern"]), []).append(record)

    def read(records, pattern=None):
        changes = {} if pattern is None else {"pattern": pattern}
        if pattern == DENSE:
            changes |= {"block": 0, "density": 1.0}
        return [losses[name_losses(record["key"] | changes)] for record in records]

    rows = []
    for (block, density, pattern), records in groups.items():
        if pattern == DENSE:
            continue
        found = read(records)
        cost = compare(found, read(records, DENSE))
        values = {
            "perplexity": float(np.exp(np.mean(np.concatenate(found)))),
            "kept": float(np.mean([r["values"]["kept"] for r in records])),
            "cost": cost,
        }
        shares = [r["values"].get("attention_kept") for r in records]
        if None not in shares:
            values["attention_kept"] = float(np.mean(shares))
        windows = groups.get((block, density, SINK_WINDOW), ())
        if len(windows) >= len(records) and pattern != SINK_WINDOW:
            values["gain"] = compare(read(records, SINK_WINDOW), found)
        for oracle in (ORACLE, FREE_ORACLE):
            if "gain" in values and len(groups.get((block, density, oracle), ())) == len(records):
                gap = compare(read(records, SINK_WINDOW), read(records, oracle))
                values[f"share of {oracle}"] = values["gain"].mean / gap.mean
        sizes = {"block": block, "density": density}
        timed = sizes | {"device": records[0]["key"]["device"]}
        if timed in speed:
            seconds = speed[timed]["values"]
            values |= {"seconds": seconds[pattern], "of_dense": seconds[pattern] / seconds[DENSE]}
        key = sizes | {"pattern": pattern, "documents": len(records)}
        rows.append({"key": key, "values": values, "environment": records[0]["environment"]})
    rows.sort(key=lambda r: (r["key"]["density"], r["key"]["block"], r["values"]["cost"].mean))
    return rows


def _show(name: str, sign: str) -> Callable[[Any], str]:
    return lambda r: "{:{sign}.3f} ± {:.3f}".format(*r["values"][name], sign=sign)


def _show_share(record: Any, oracle: str) -> str | None:
    share = record["values"][f"share of {oracle}"]
    return f"{share:.0%}" if share > 0 else None


COLUMNS = (
    Column("blocks of", lambda r: str(r["key"]["block"])),
    Column("density", lambda r: f"{r['values']['kept']:.3f}"),
    Column("pattern", lambda r: r["key"]["pattern"]),
    Column("perplexity", lambda r: f"{r['values']['perplexity']:.2f}"),
    Column("above dense, nats", _show("cost", "")),
    Column("gain over sink + window, nats", _show("gain", "+")),
    Column("of the oracle's gain", lambda r: _show_share(r, ORACLE)),
    Column("of the sharing oracle's", lambda r: _show_share(r, FREE_ORACLE)),
    Column("attention kept", lambda r: f"{r['values']['attention_kept']:.3f}"),
    Column("forward pass, ms", lambda r: f"{1e3 * r['values']['seconds']:,.0f}"),
    Column("of dense", lambda r: f"{r['values']['of_dense']:.2f}"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the table.

    Args:
      arguments: of the command line.
    """
    options = parse_arguments("Attention patterns of a pretrained model.", arguments)
    began = time.perf_counter()
    results, losses = Results(RESULTS / f"{NAME}.json"), Losses(RESULTS / f"{NAME}.npz")
    speed = Results(RESULTS / f"{SPEED}.json")

    @functools.lru_cache(1)
    def load(block_size):
        loaded = load_smollm2(LENGTH, block_size=block_size)
        documents = list_documents(loaded.tokenizer, LENGTH)

        @functools.cache
        def get_maps(index):
            return measure_maps(loaded.model, documents[index].ids_T, block_size)

        return loaded.model, documents, get_maps

    how: dict[str, Any] = {
        "force": options.force,
        "is_late": lambda: time.perf_counter() - began > options.budget_seconds,
    }
    for block_size, density in SETTINGS[: 2 if options.headline else None]:
        setting = Setting(*load(block_size), block_size=block_size, density=density)
        measure_losses(setting, results, losses, **how)
        measure_speed(setting, speed, **how)
    rows = summarise(results, losses, speed)
    perplexity = [r["values"]["loss"] for r in results.records if r["key"]["pattern"] == DENSE]
    heading = f"Dense: perplexity {np.exp(np.mean(perplexity)):.2f}.\n\n"
    table = heading + make_table(rows, COLUMNS)
    (RESULTS / f"{NAME}.md").write_text(table)
    print("\n" + table)


if __name__ == "__main__":
    sys.exit(main())
