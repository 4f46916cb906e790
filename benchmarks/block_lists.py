"""What does it save to build the lists of attention blocks once and not in every step?

    python -m benchmarks.block_lists

Sparse steps of a small decoder, attention through the lists, with lists carried beside the state
and with lists built from the masks in each step. Written to results/block_lists.json: of each
size, the median of the ratio over rounds, carried / built, with its quartiles.
"""

import json
import statistics
import sys

import jax
import numpy as np

from benchmarks.environment import describe_environment
from benchmarks.harness import RESULTS
from benchmarks.steps import make_step_call
from pallas_kernels.doctor.timing import time_interleaved
from sparsejax.models import TransformerConfig
from sparsejax.optimizer import OptimizerConfig, make_optimizer
from sparsejax.patterns import BlockPattern
from sparsejax.recipes import StaticAttentionConfig, make_static_attention
from sparsejax.training.step import Batch

_VOCAB_SIZE, _DENSITY = 256, 0.15
# Layers, positions, side of a block: those of `configs/spion_small.py` (once the quickstart's), and
# where lists are long for the work.
SIZES = {"quickstart": (2, 2048, 64), "small blocks": (4, 2048, 16)}
"""What is measured, by name."""


def measure(num_layers: int, length: int, block: int) -> dict[str, float]:
    """Time steps with carried and with built lists in turns.

    Args:
      num_layers: of the model.
      length: positions.
      block: side of an attention block, positions.

    Returns:
      Seconds per step of both, medians; "ratio", carried / built, and its quartiles "low", "high".
    """
    model = TransformerConfig(
        vocab_size=_VOCAB_SIZE,
        num_layers=num_layers,
        model_dim=128,
        num_heads=2,
        num_kv_heads=2,
        mlp_dim=512,
        max_length=length,
        causal=True,
        positions="rotary",
        block=BlockPattern(block_q=block, block_kv=block),
    )
    recipe = make_static_attention(
        StaticAttentionConfig(
            pattern="bigbird",
            density=_DENSITY,
            causal=True,
            num_layers=num_layers,
            num_blocks=length // block,
            num_steps=100,
        )
    )
    optimizer = make_optimizer(OptimizerConfig(schedule="constant"), num_steps=1000)
    calls = {
        name: make_step_call(
            model, recipe, recipe.phases[0], optimizer, _draw_batch(length), carries_lists=carries
        ).call
        for name, carries in (("carried", True), ("built", False))
    }
    seconds = time_interleaved(calls, repeats=30, limit_seconds=25.0)
    ratios = [a / b for a, b in zip(seconds["carried"], seconds["built"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = {f"{name}_step_seconds": statistics.median(x) for name, x in seconds.items()}
    return medians | {"ratio": middle, "low": low, "high": high, "rounds": len(ratios)}


def main() -> int:
    """Measure all sizes, print them and write the results.

    Returns:
      Exit code 0.
    """
    results = {"environment": describe_environment(), "sizes": {}}
    for name, sizes in SIZES.items():
        results["sizes"][name] = found = measure(*sizes)
        print(
            f"{name}: {found['carried_step_seconds']:.4f} s carried, "
            f"{found['built_step_seconds']:.4f} s built, ratio {found['ratio']:.4f} "
            f"({found['low']:.4f} to {found['high']:.4f}, {found['rounds']} rounds)"
        )
    (RESULTS / "block_lists.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _draw_batch(length: int) -> Batch:
    tokens = np.random.default_rng(0).integers(0, _VOCAB_SIZE, (2, length + 1), dtype=np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    return jax.tree.map(jax.numpy.asarray, batch | {"loss_weights": np.ones(2, np.float32)})


if __name__ == "__main__":
    sys.exit(main())
