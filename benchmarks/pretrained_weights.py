"""What does a pretrained model lose when feed-forward weights are pruned, and what comes back?

    python -m benchmarks.pretrained_weights [--headline] [--force] [--budget-seconds=N]

SmolLM2-135M loses half of its feed-forward weights in each pattern: by magnitude, or by magnitude
times the root mean square of the feature that a weight multiplies, over two calibration documents
of 2,048 tokens. Nothing is trained. Perplexities are those of the first 512 tokens of four other
documents, none of which is in what is trained on.

Then some are trained, all together for about an hour on two CPU cores: they say how fast a loss
begins to fall, not where it ends. --headline leaves this out. Rows are measured once, on whichever
device: what they say does not depend on it, but for the seconds.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.environment import describe_environment
from benchmarks.harness import RESULTS, parse_arguments
from benchmarks.pretrained_documents import list_documents
from benchmarks.pretrained_recovery import BATCH_SIZE, LENGTH, Training, make_text, train
from benchmarks.records import Column, Results, make_table
from benchmarks.smollm2 import load_smollm2
from sparsejax.calibration import (
    choose_mask,
    collect_statistics,
    score_weights,
    set_weight_masks,
)
from sparsejax.data import Tokenizer
from sparsejax.models import SparsityMask, Transformer, make_transformer
from sparsejax.patterns import NMPattern, WeightPattern, parse_weight_pattern

NAME, DENSE = "pretrained_weights", "dense"
CALIBRATION_LENGTH, TEST_LENGTH = 2048, 512
CALIBRATION = ("types", "classes")
LAYERS = "mlp/.*"
MAGNITUDE, ACTIVATION_AWARE = "magnitude", "activation-aware"
PATTERNS = (
    ("2:4", 0.5),
    ("2:4 transposable", 0.5),
    ("unstructured", 0.5),
    ("16x16", 0.9),
    ("16x16", 0.5),
    ("64x64", 0.5),
)


class Recovery(NamedTuple):
    """One training run, from pruned weights or from all."""

    pattern: str
    scores: str
    training: Training


RECOVERIES = (
    Recovery("2:4", ACTIVATION_AWARE, "fixed masks"),
    Recovery("2:4 transposable", MAGNITUDE, "FST"),
    Recovery(DENSE, "", "dense"),
    Recovery("2:4 transposable", ACTIVATION_AWARE, "fixed masks"),
    Recovery("2:4", MAGNITUDE, "STE"),
)
NUM_STEPS, LEARNING_RATE = 72, 5e-5


@functools.partial(jax.jit, static_argnums=0)
def _compute_loss(graphdef, state, ids_T):
    logits_TV = nnx.merge(graphdef, state)(ids_T[None]).logits[0]
    return optax.softmax_cross_entropy_with_integer_labels(logits_TV[:-1], ids_T[1:]).mean()


class Laboratory:
    """The model, its documents, and what was measured of them once."""

    def __init__(self):
        """Load the model, without masks of weights."""
        loaded = load_smollm2(CALIBRATION_LENGTH)
        assert loaded.tokenizer is not None
        self.tokenizer: Tokenizer = loaded.tokenizer
        self._dense = loaded.model
        self._documents = list_documents(loaded.tokenizer, CALIBRATION_LENGTH)
        self._get_norms = functools.cache(self._measure_norms)

    def prune(self, pattern: str, scores: str, *, density: float = 0.5) -> Transformer:
        """Return the pruned model.

        Args:
          pattern: of `PATTERNS`, or "dense", which prunes nothing.
          density: share that is kept, unless the pattern says it.
          scores: "magnitude" or "activation-aware"; without effect if dense.
        """
        if pattern == DENSE:
            return self._dense
        parsed = parse_weight_pattern(pattern)
        model = _add_masks(self._dense, parsed)
        kept = None if isinstance(parsed, NMPattern) else density
        found = score_weights(model, self._get_norms() if scores == ACTIVATION_AWARE else None)
        masks = {name: choose_mask(x_LKN, parsed, kept) for name, x_LKN in found.items()}
        return set_weight_masks(model, masks)

    def measure(self, model: Transformer) -> dict[str, Any]:
        """Return mean losses, in nats, and perplexity on the test documents."""
        graphdef, state = nnx.split(model)
        losses = {
            document.name: float(_compute_loss(graphdef, state, document.ids_T[:TEST_LENGTH]))
            for document in self._documents
            if document.use == "test"
        }
        return {"losses": losses, "perplexity": float(np.exp(np.mean([*losses.values()])))}

    def _measure_norms(self):
        documents = [d for d in self._documents if d.name in CALIBRATION]
        batches = [document.ids_T[None] for document in documents]
        return collect_statistics(self._dense, batches).norms


def _add_masks(model: Transformer, pattern: WeightPattern) -> Transformer:
    """Return a model of the same parameters whose feed-forward weights have full masks."""
    config = dataclasses.replace(model.config, sparse_weights=((LAYERS, pattern),))
    abstract = nnx.eval_shape(lambda: make_transformer(config, rngs=nnx.Rngs(0)))
    graphdef, _, masks = nnx.split(abstract, nnx.Param, SparsityMask)
    kept = jax.tree.map(lambda mask: jnp.ones(mask.shape, bool), nnx.to_pure_dict(masks))
    masked = nnx.merge(graphdef, nnx.state(model, nnx.Param), kept)
    masked.attention_options = model.attention_options
    return masked


def list_rows(laboratory: Laboratory) -> Iterator[tuple[dict[str, Any], Callable[[], Any]]]:
    """Yield the key of every row, most important first, and what measures it.

    Args:
      laboratory: where.
    """

    def measure_pruned(pattern, scores, density):
        return laboratory.measure(laboratory.prune(pattern, scores, density=density))

    yield _make_key(DENSE, "", 1.0), functools.partial(measure_pruned, DENSE, "", 1.0)
    for pattern, density in PATTERNS:
        for scores in (MAGNITUDE, ACTIVATION_AWARE):
            measure = functools.partial(measure_pruned, pattern, scores, density)
            yield _make_key(pattern, scores, density), measure
    for recovery in RECOVERIES:
        density = 1.0 if recovery.pattern == DENSE else 0.5
        key = _make_key(recovery.pattern, recovery.scores, density) | {
            "training": recovery.training,
            "steps": NUM_STEPS,
            "tokens": NUM_STEPS * BATCH_SIZE * LENGTH,
            "learning rate": LEARNING_RATE,
        }
        yield key, functools.partial(_recover, laboratory, recovery)


def _make_key(pattern: str, scores: str, density: float) -> dict[str, Any]:
    return {
        "pattern": pattern,
        "density": density,
        "scores": scores,
        "training": "none",
    }


def _recover(laboratory: Laboratory, recovery: Recovery) -> dict[str, Any]:
    text = make_text(laboratory.tokenizer, NUM_STEPS)
    model = laboratory.prune(recovery.pattern, recovery.scores)
    began = time.perf_counter()
    model, losses = train(model, text, training=recovery.training, learning_rate=LEARNING_RATE)
    seconds = time.perf_counter() - began
    trained = {"training losses": losses, "seconds": seconds, "sha256": text.sha256}
    return laboratory.measure(model) | trained


def _show_training(record: Mapping[str, Any]) -> str:
    key = record["key"]
    if key["training"] == "none":
        return "none"
    return f"{key['training']}, {key['steps']} steps of {key['tokens'] // key['steps']} tokens"


COLUMNS = (
    Column("feed-forward weights", lambda r: r["key"]["pattern"]),
    Column("kept", lambda r: f"{r['key']['density']:.0%}"),
    Column("scores", lambda r: r["key"]["scores"]),
    Column("training", _show_training),
    Column("perplexity", lambda r: f"{r['values']['perplexity']:.4g}"),
    Column("seconds of training", lambda r: f"{r['values']['seconds']:.0f}"),
)


def _join_devices(records):
    """Return the records as if of one device, so that they stand in one table."""
    devices = ", ".join(dict.fromkeys(r["environment"]["device"] for r in records))
    return [r | {"environment": r["environment"] | {"device": devices}} for r in records]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the table.

    Args:
      arguments: of the command line.
    """
    options = parse_arguments("Weights of a pretrained model, pruned and trained.", arguments)
    began = time.perf_counter()
    results, laboratory = Results(RESULTS / f"{NAME}.json"), Laboratory()
    for key, measure in list_rows(laboratory):
        if time.perf_counter() - began > options.budget_seconds:
            break
        if options.headline and key["training"] != "none":
            continue
        if key in results and not options.force:
            continue
        values = measure()
        results.record(key, values, describe_environment())
        print(f"{key}: perplexity {values['perplexity']:.2f}", flush=True)
    table = make_table(_join_devices(results.records), COLUMNS)
    (RESULTS / f"{NAME}.md").write_text(table)
    print("\n" + table)


if __name__ == "__main__":
    sys.exit(main())
