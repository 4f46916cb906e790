"""Which blocks of attention does a pretrained model need, and who finds them?

    python -m benchmarks.pretrained_attention [--headline] [--force] [--budget-seconds=N]

SmolLM2-135M, which was trained with dense attention, reads four documents of 2,048 tokens through
the blocks of each pattern, without training. Fixed patterns know nothing, learned ones have seen
four other documents, "habits alone" and "dynamic" are calibrated by these, "dynamic" chooses from
the document itself and causally, "lookahead" too but from the queries of the block itself, and the
oracles keep the highest of the dense model's own maps of the document. All keep as many blocks.

Losses of every token are kept (`results/pretrained_attention.npz`, in units of 1e-4 nats), so that
patterns are compared token by token. Errors are those of means over chunks of 64 tokens, 95 %.

Legend: L layers, T positions, N query heads, I = J blocks along one side.
"""

import functools
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.environment import describe_environment, device_name
from benchmarks.harness import RESULTS, parse_arguments
from benchmarks.pretrained_documents import Document, list_documents
from benchmarks.pretrained_patterns import (
    CHOSEN,
    FREE_ORACLE,
    ORACLE,
    PATTERNS,
    SINK_WINDOW,
    average_maps,
    make_chooser,
    make_masks,
    make_oracles,
    measure_maps,
)
from benchmarks.records import Column, Results, make_table
from benchmarks.smollm2 import load_smollm2
from sparsejax.masks import block_density
from sparsejax.models import AttentionOptions, SparsityMask, Transformer

NAME, LENGTH, DENSE = "pretrained_attention", 2048, "dense"
SETTINGS = ((64, 0.2), (32, 0.2), (64, 0.3), (32, 0.1), (32, 0.3))
_CHUNK = 64
_UNIT = 1e-4


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


def make_loss(
    model: Transformer, options: AttentionOptions
) -> Callable[[Any, np.ndarray | None, np.ndarray], np.ndarray]:
    """Return the jitted function of masks and tokens to the loss of every token but the first.

    Args:
      options: AttentionOptions of the forward pass.

    Returns:
      Function (params, masks bool[L, 1 | N, I, J] or None, ids i32[T]) -> f32[T - 1].
    """
    graphdef, _, masks = nnx.split(model, nnx.Param, SparsityMask)
    plain = nnx.to_pure_dict(masks)

    @jax.jit
    def compute(params, masks_LNIJ, ids_T):
        masks = plain
        if masks_LNIJ is not None:
            attention = plain["blocks"]["attention"] | {"block_mask": masks_LNIJ[:, None]}
            masks = plain | {"blocks": plain["blocks"] | {"attention": attention}}
        merged = nnx.merge(graphdef, params, masks)
        logits_TV = merged(ids_T[None], attention_options=options).logits[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits_TV[:-1], ids_T[1:])

    return compute


def run_setting(
    model: Transformer,
    documents: Sequence[Document],
    results: Results,
    losses: Losses,
    *,
    block_size: int,
    density: float,
    force: bool,
    is_late: Callable[[], bool],
) -> None:
    """Evaluate all patterns of one density and block size on all documents.

    Args:
      model: SmolLM2, with blocks of that size.
      documents: of `list_documents`.
      results: file that summaries go to.
      losses: file that losses go to.
      block_size: int, side of a block, positions.
      density: float, share of the visible blocks that is kept.
      force: measure again what is there.
      is_late: says when to stop.
    """
    params = nnx.state(model, nnx.Param)
    get_maps = functools.cache(lambda i: measure_maps(model, documents[i].ids_T, block_size))
    tests = [i for i, document in enumerate(documents) if document.use == "test"]
    calibrations = [i for i, document in enumerate(documents) if document.use == "calibration"]
    ids_BT = np.stack([documents[i].ids_T for i in calibrations])
    sizes = {"density": density, "block_size": block_size}
    get_chooser = functools.cache(lambda name: make_chooser(name, model, ids_BT, **sizes))
    fixed: Mapping[str, np.ndarray] = {}
    dense = make_loss(model, AttentionOptions(sparse=False))
    sparse = make_loss(model, AttentionOptions())
    choose = functools.cache(
        lambda name: make_loss(model, AttentionOptions(choose_blocks=get_chooser(name)))
    )

    def measure(pattern: str, index: int) -> tuple[np.ndarray, float, float | None]:
        """Return losses, density and share of the dense attention that is kept."""
        nonlocal fixed
        document = documents[index]
        if pattern == DENSE:
            return dense(params, None, document.ids_T), 1.0, 1.0
        if pattern in CHOSEN:
            loss_T = choose(pattern)(params, None, document.ids_T)
            return loss_T, _mean_density(get_chooser(pattern), model), None
        if not fixed:
            calibration = average_maps([get_maps(i) for i in calibrations])
            fixed = make_masks(calibration, **sizes)
        maps = get_maps(index)
        masks = dict(fixed) | make_oracles(maps, density=density)
        kept_LNIJ = masks[pattern]
        shares = (maps.blocks_LNIJ * kept_LNIJ).sum(-1).mean()
        loss_T = sparse(params, kept_LNIJ, document.ids_T)
        kept = float(block_density(jnp.asarray(kept_LNIJ), causal=True).mean())
        return loss_T, kept, float(shares)

    for pattern in (DENSE, *dict.fromkeys(PATTERNS)):
        for index in tests:
            document = documents[index]
            key = {
                "pattern": pattern,
                "block": 0 if pattern == DENSE else block_size,
                "density": 1.0 if pattern == DENSE else density,
                "document": document.name,
                "device": device_name(),
            }
            if is_late() or (key in results and not force):
                continue
            began = time.perf_counter()
            loss_T, kept, share = measure(pattern, index)
            losses.record(name_losses(key), np.asarray(loss_T))
            values = {"loss": float(np.mean(loss_T)), "kept": kept, "sha256": document.sha256}
            if share is not None:
                values["attention_kept"] = share
            results.record(key, values, describe_environment())
            took = time.perf_counter() - began
            print(f"{key}: {values['loss']:.4f} nats, density {kept:.4f}, {took:.0f} s", flush=True)


def _mean_density(chooser: Any, model: Transformer) -> float:
    config = model.config
    return float(chooser.measure_density(config.block.grid(LENGTH)[0], config.num_heads).mean())


def name_losses(key: Mapping[str, Any]) -> str:
    """Return the name of one document's losses in the file."""
    return f"{key['pattern']}|{key['block']}|{key['density']}|{key['document']}"


def summarise(results: Results, losses: Losses) -> list[dict[str, Any]]:
    """Compare the patterns of each setting over its documents.

    Args:
      results: with at least the dense losses of a document.
      losses: of the same.

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
        key = {"block": block, "density": density, "pattern": pattern, "documents": len(records)}
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
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the table.

    Args:
      arguments: of the command line.
    """
    options = parse_arguments("Attention patterns of a pretrained model.", arguments)
    began = time.perf_counter()
    results, losses = Results(RESULTS / f"{NAME}.json"), Losses(RESULTS / f"{NAME}.npz")
    load = functools.cache(lambda block_size: load_smollm2(LENGTH, block_size=block_size))
    for block_size, density in SETTINGS[: 2 if options.headline else None]:
        loaded = load(block_size)
        run_setting(
            loaded.model,
            list_documents(loaded.tokenizer, LENGTH),
            results,
            losses,
            block_size=block_size,
            density=density,
            force=options.force,
            is_late=lambda: time.perf_counter() - began > options.budget_seconds,
        )
    rows = summarise(results, losses)
    perplexity = [r["values"]["loss"] for r in results.records if r["key"]["pattern"] == DENSE]
    heading = f"Dense: perplexity {np.exp(np.mean(perplexity)):.2f}.\n\n"
    table = heading + make_table(rows, COLUMNS)
    (RESULTS / f"{NAME}.md").write_text(table)
    print("\n" + table)


if __name__ == "__main__":
    sys.exit(main())
