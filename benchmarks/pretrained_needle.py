"""Does a pretrained model still find one sentence in a long text under sparse attention?

    python -m benchmarks.pretrained_needle [--headline] [--force] [--budget-seconds=N]

A sentence with a number of four digits is put into real prose, at some depth; the text ends by
asking for it. Found is a needle whose digits are all likeliest when the digits before are given.
Patterns keep a fifth of the blocks of 64; "lookahead" may, since the whole text is a prompt.
`--headline` reads 4,096 tokens only, not 8,192.
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from benchmarks.environment import describe_environment, device_name
from benchmarks.harness import RESULTS, parse_arguments
from benchmarks.pretrained_documents import list_documents
from benchmarks.pretrained_patterns import CHOSEN, DYNAMIC, HABITS, LOOKAHEAD, SINK_WINDOW
from benchmarks.pretrained_setting import DENSE
from benchmarks.records import Column, Results, make_table
from benchmarks.smollm2 import load_smollm2
from sparsejax.calibration import calibrate_blocks
from sparsejax.masks import DynamicBlocks, pattern_at_density
from sparsejax.models import AttentionOptions

NAME, BLOCK, DENSITY = "pretrained_needle", 64, 0.2
LENGTHS = (4096, 8192)
# Four documents are the prose of the longest text, and four calibrate it.
DOCUMENT_LENGTH = 2048
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
NEEDLES = {
    "harbour": ("The secret number of the harbour is ", "7194"),
    "library": ("The secret number of the library is ", "3852"),
}
PATTERNS = (DENSE, SINK_WINDOW, DYNAMIC, HABITS, LOOKAHEAD)


class Trial(NamedTuple):
    """One text with a needle and the question at its end.

    Attributes:
      ids_T: i32[T].
      answers: positions of the digits, which the ones before predict.
    """

    ids_T: np.ndarray
    answers: range


def make_trial(tokenizer: Any, prose_T: np.ndarray, length: int, depth: float, name: str) -> Trial:
    """Put a needle into prose.

    Args:
      tokenizer: of the model.
      prose_T: i32, at least `length` tokens.
      length: int, T.
      depth: float in (0, 1), share of the prose that comes before the needle.
      name: of the needle.

    Returns:
      Trial of exactly `length` tokens.
    """
    sentence, number = NEEDLES[name]
    texts = [
        f"\n\n{sentence}{number}.\n\n",
        f"\n\nQuestion: what is it?\nAnswer: {sentence}",
        number,
    ]
    needle, question, answer = (
        np.asarray(ids, np.int32) for ids in tokenizer.encode([text.encode() for text in texts])
    )
    room = length - len(needle) - len(question) - len(answer)
    before = round(depth * room)
    parts = (prose_T[:before], needle, prose_T[before:room], question, answer)
    return Trial(np.concatenate(parts), range(length - len(answer), length))


def make_patterns(model: Any, prose_BT: np.ndarray) -> Callable[[str], Callable[..., Any]]:
    """Return what makes a pattern's jitted function of parameters and ids to the last logits.

    Patterns are calibrated when they are asked for, once.

    Args:
      model: SmolLM2 with as many positions as the texts.
      prose_BT: i32[B, T], texts by which the choice is calibrated.
    """
    num_blocks = prose_BT.shape[1] // BLOCK

    def choose(name):
        blocks = DynamicBlocks(
            density=DENSITY,
            block_size=BLOCK,
            num_blocks=num_blocks,
            causal=True,
            **CHOSEN[name],
        )
        if not blocks.lookahead:
            blocks = calibrate_blocks(model, prose_BT, blocks)
        return AttentionOptions(choose_blocks=blocks)

    kept_IJ = pattern_at_density("sink_window", num_blocks, density=DENSITY, causal=True)
    mask = model.blocks.attention.block_mask
    mask[...] = jax.numpy.broadcast_to(kept_IJ, mask[...].shape)
    graphdef, _ = nnx.split(model)

    def make(options):
        @functools.partial(jax.jit, static_argnums=2)
        def compute(state, ids_T, last):
            merged = nnx.merge(graphdef, state)
            x_BTD, _ = merged.prefill(ids_T[None], attention_options=options)
            return merged.compute_logits(x_BTD[0, -last - 1 : -1])

        return compute

    options = {DENSE: AttentionOptions(sparse=False), SINK_WINDOW: AttentionOptions()}
    return functools.cache(lambda name: make(options.get(name) or choose(name)))


def _row(results: Results, length: int, pattern: str) -> dict[str, Any] | None:
    records = [
        record
        for record in results.records
        if (record["key"]["length"], record["key"]["pattern"]) == (length, pattern)
    ]
    if not records:
        return None
    values = {
        "found": sum(record["values"]["found"] for record in records),
        "trials": len(records),
        "loss": float(np.mean([record["values"]["loss"] for record in records])),
    }
    key = {"length": length, "pattern": pattern}
    return {"key": key, "values": values, "environment": records[0]["environment"]}


COLUMNS = (
    Column("tokens", lambda r: f"{r['key']['length']:,}"),
    Column("pattern", lambda r: r["key"]["pattern"]),
    Column("needles found", lambda r: f"{r['values']['found']} of {r['values']['trials']}"),
    Column("loss of a digit, nats", lambda r: f"{r['values']['loss']:.2f}"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write the table.

    Args:
      arguments: of the command line.
    """
    options = parse_arguments("Needles in real prose under sparse attention.", arguments)
    began = time.perf_counter()
    results = Results(RESULTS / f"{NAME}.json")
    for length in LENGTHS[: 1 if options.headline else None]:
        loaded = load_smollm2(length, block_size=BLOCK)
        documents = list_documents(loaded.tokenizer, DOCUMENT_LENGTH)
        calibration_T, prose_T = (
            np.concatenate([d.ids_T for d in documents if d.use == use])
            for use in ("calibration", "test")
        )
        get_pattern = make_patterns(loaded.model, calibration_T.reshape(-1, length))
        state = nnx.state(loaded.model)
        for depth in DEPTHS:
            for name in NEEDLES:
                trial = make_trial(loaded.tokenizer, prose_T, length, depth, name)
                for pattern in PATTERNS:
                    key = {
                        "length": length,
                        "depth": depth,
                        "needle": name,
                        "pattern": pattern,
                        "device": device_name(),
                    }
                    late = time.perf_counter() - began > options.budget_seconds
                    if late or (key in results and not options.force):
                        continue
                    count = len(trial.answers)
                    logits = np.asarray(get_pattern(pattern)(state, trial.ids_T, count))
                    wanted = trial.ids_T[trial.answers.start :]
                    losses = jax.nn.logsumexp(logits, -1) - logits[np.arange(count), wanted]
                    found = bool((logits.argmax(-1) == wanted).all())
                    values = {"found": found, "loss": float(losses.mean())}
                    results.record(key, values, describe_environment())
                    print(f"{key}: {values}", flush=True)
    rows = [_row(results, n, p) for n in LENGTHS for p in PATTERNS]
    table = make_table([row for row in rows if row], COLUMNS)
    (RESULTS / f"{NAME}.md").write_text(table)
    print("\n" + table)


if __name__ == "__main__":
    sys.exit(main())
