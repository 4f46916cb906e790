"""What does it cost a training step to look at its own attention maps, as SPION and SAT do?

    python -m benchmarks.probe_cost [--headline] [--force] [--budget-seconds=N]

Timed are whole steps of an encoder of the shape of Long Range Arena (4 layers, width 64, 2 heads),
dense, state donated: one that probes for each method, and one that does not probe. On a Hopper GPU
a second set of points names the kernel that adds up the maps. What a probe costs is the difference.
SAT as published pays it in every step.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from benchmarks.harness import Case, ForeignCall, Point, parse_arguments
from benchmarks.records import Column
from benchmarks.steps import (
    make_classification_batch,
    make_step_call,
    make_steps_case,
    run_and_evaluate,
)
from benchmarks.targets import Target, seconds_of
from configs import base
from pallas_kernels import Implementation
from sparsejax.config.parse import parse_config
from sparsejax.config.schema import TrainConfig, make_recipe, make_transformer_config
from sparsejax.optimizer import make_optimizer

PLAIN = "no probe"
METHODS = ("spion", "sat")


class Problem(NamedTuple):
    """A step whose cost is measured.

    Attributes:
      length: int, positions.
      batch: int, examples.
      dtype: str, of activations.
      implementation: what runs the probe; None for what a run gets that names nothing.
    """

    length: int
    batch: int
    dtype: str = "float32"
    implementation: Implementation | None = None

    def key(self) -> dict[str, str | int]:
        """Return the settings as a key of the results."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def config(self, method: str) -> TrainConfig:
        """Return the settings of a run.

        Args:
          method: str, name of a recipe.
        """
        settings = base.get_config().to_dict()
        settings["model"] |= {"model_dim": 64, "num_heads": 2, "mlp_dim": 128}
        settings["model"]["dtype"] = self.dtype
        settings["data"] |= {"source": "listops", "sequence_length": self.length}
        settings["data"]["batch_size"] = self.batch
        settings["recipe"]["name"] = method
        settings["recipe"]["spion"]["quantile"] = 0.96
        return parse_config(settings)


def make_case(problem: Problem) -> Case:
    """Make the steps that one point compares, each on a state of its own."""
    batch = make_classification_batch(
        batch_size=problem.batch, shape=(problem.length,), vocab_size=16, num_classes=10
    )

    def make_call(method: str, probes: bool) -> ForeignCall:
        config = problem.config(method)
        model = make_transformer_config(
            config, task="classification", vocab_size=16, num_classes=10
        )
        recipe = make_recipe(config, model)
        optimizer = make_optimizer(config.optimizer, num_steps=config.num_steps)
        return make_step_call(
            model,
            recipe,
            recipe.phases[0],
            optimizer,
            batch,
            probes=probes,
            implementation=problem.implementation,
        )

    calls = {PLAIN: make_call("dense", False)}
    calls |= {method: make_call(method, True) for method in METHODS}
    return make_steps_case(calls)


def _cost(record: Any, name: str) -> float:
    return seconds_of(record, name) / seconds_of(record, PLAIN) - 1


def _percent(name: str, per: int = 1):
    return lambda record: f"{100 * _cost(record, name) / per:.3g} %"


COLUMNS = (
    Column("positions", lambda r: str(r["key"]["length"])),
    Column("batch", lambda r: str(r["key"]["batch"])),
    Column("probe on", lambda r: r["key"].get("implementation"), optional=True),
    Column("dense step, ms", lambda r: f"{1e3 * seconds_of(r, PLAIN):.1f}"),
    Column("SPION's probe, of a dense step", _percent("spion")),
    Column("every 100 steps", _percent("spion", 100)),
    Column("SAT's probe, in every step as published", _percent("sat")),
    Column("every 10 steps", _percent("sat", 10)),
)


def _worst(record: Any) -> float:
    return max(_cost(record, method) for method in METHODS)


TARGETS = (
    Target("a probe costs less than 40 % of a dense step", _worst, lambda x: x < 0.4, max),
    Target(
        "less than 10 % per step at SPION's default interval of 100",
        lambda record: _cost(record, "spion") / 100,
        lambda x: x < 0.1,
        max,
    ),
    Target(
        "less than 10 % per step at SAT's interval of 10",
        lambda record: _cost(record, "sat") / 10,
        lambda x: x < 0.1,
        max,
    ),
)


def list_problems(platform: str, capability: str = "", *, headline: bool) -> list[Problem]:
    """Return what is measured.

    Args:
      platform: str, of the device.
      capability: str, compute capability of a GPU; the Hopper kernel runs on 9.
      headline: bool, only the first point.
    """
    if platform == "cpu":
        problems = [Problem(2048, 4), Problem(4096, 1)]
    else:
        problems = [Problem(2048, 32, "bfloat16"), Problem(4096, 16, "bfloat16")]
        if capability.startswith("9."):
            problems += [p._replace(implementation="mosaic_sm90") for p in problems]
    return problems[:1] if headline else problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the points that are missing; write and print table and targets.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if every step trained. A missed target is no error.
    """
    parsed = vars(parse_arguments((__doc__ or "").splitlines()[0], arguments))
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "")
    problems = list_problems(device.platform, capability, headline=parsed.pop("headline"))
    points = [Point(p.key(), functools.partial(make_case, p)) for p in problems]
    return run_and_evaluate("probe_cost", points, COLUMNS, TARGETS, **parsed)


if __name__ == "__main__":
    sys.exit(main())
