"""What do 2:4 feed-forward weights save of a transformer block, and of a whole training step?

    python -m benchmarks.fst_gpt2 [--headline] [--force] [--budget-seconds=N]

A block is timed forward and backward, with packing of both weights and MVUE. A step is the train
step of `configs/fst_gpt2.py`, state donated, one micro-batch, timed over the steps from one search
for masks to the next, the search included; dense is its dense finish, on a state of the same
kind. A CPU takes the model of `configs/fst_small.py`, where sparse weights can only cost.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.harness import RESULTS, Case, Point, parse_arguments, run_points
from benchmarks.nm_matmul import choose_kernels
from benchmarks.nm_matmul_report import HOPPER
from benchmarks.records import Column, Results
from benchmarks.steps import make_step_call, make_steps_case
from benchmarks.targets import Target, evaluate, times_faster
from configs import fst_gpt2, fst_small
from pallas_kernels.doctor.timing import relative_error
from sparsejax.accounting.flops import count_transformer_flops
from sparsejax.config.parse import parse_config
from sparsejax.config.schema import TrainConfig, make_recipe, make_transformer_config
from sparsejax.masks import transposable_mask
from sparsejax.models import (
    DENSE_LINEAR,
    AttentionOptions,
    Implementation,
    LinearOptions,
    SparsityMask,
    TransformerConfig,
)
from sparsejax.models.block import Block
from sparsejax.optimizer import make_optimizer
from sparsejax.patterns import BlockPattern, NMPattern

DENSE = "dense"
_DENSE_ATTENTION = AttentionOptions(sparse=False)
_TOLERANCE = 3e-2  # of bfloat16, through a block


class BlockProblem(NamedTuple):
    """A transformer block, feed-forward width 4 times the model's.

    Attributes:
      width: int, of the model; heads of 64.
      batch: int, sequences.
      length: int, positions.
      dtype: type of activations.
    """

    width: int
    batch: int
    length: int = 1024
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def key(self) -> dict[str, str | int]:
        """Return the settings as a key of the results."""
        return {"measure": "block", "model": f"width {self.width}", **self._asdict()}

    def model(self) -> TransformerConfig:
        """Return the model that the block is of."""
        return TransformerConfig(
            vocab_size=1,
            num_layers=1,
            model_dim=self.width,
            num_heads=self.width // 64,
            num_kv_heads=self.width // 64,
            mlp_dim=4 * self.width,
            max_length=self.length,
            causal=True,
            dtype=self.dtype,
            block=BlockPattern(block_q=64, block_kv=64),
            sparse_weights=(("mlp/.*", NMPattern(transposable=True)),),
        )


class StepProblem(NamedTuple):
    """A training step.

    Attributes:
      size: str, of `configs/fst_gpt2.py`, or "small" for `configs/fst_small.py`.
      batch: int, sequences.
    """

    size: str
    batch: int

    def key(self) -> dict[str, str | int]:
        """Return the settings as a key of the results."""
        return {"measure": "step", "model": self.size, "batch": self.batch}

    def config(self) -> TrainConfig:
        """Return the settings of the run that the step is of."""
        small = self.size == "small"
        config = fst_small.get_config() if small else fst_gpt2.get_config(self.size)
        settings = config.to_dict()
        settings["data"]["batch_size"], settings["num_micro_batches"] = self.batch, 1
        return parse_config(settings)


def list_problems(platform: str, *, headline: bool) -> list[BlockProblem | StepProblem]:
    """Return what is measured, most important first.

    Args:
      platform: str, of the device.
      headline: bool, leave out what `make gpu` has no time for: steps and rarer blocks.

    Returns:
      list of problems.
    """
    if platform == "cpu":
        return [StepProblem("small", 8), BlockProblem(128, 4, 256, "float32")]
    most: list[BlockProblem | StepProblem] = [BlockProblem(1280, 16), BlockProblem(2048, 16)]
    # Steps take minutes: eight times as many as there are from one search to the next.
    rest = [
        StepProblem("774m", 16),
        StepProblem("124m", 32),
        StepProblem("350m", 16),
        StepProblem("1558m", 8),
        *(BlockProblem(width, 16) for width in (768, 1024, 1600, 4096)),
    ]
    return most if headline else most + rest


def make_block_case(problem: BlockProblem, kernel: Implementation) -> Case:
    """Make the passes of a block, dense and sparse, on the same inputs.

    Args:
      kernel: implementation of sparse weights.

    Returns:
      Case. What is compared are y and dx: dw differs by what MVUE draws.
    """
    model = problem.model()
    shape = (problem.batch, problem.length, problem.width)
    graphdef = nnx.split(nnx.eval_shape(lambda: Block(model, rngs=nnx.Rngs(0))))[0]

    @jax.jit
    def make_args():
        block = Block(model, rngs=nnx.Rngs(0))
        params, masks = map(nnx.to_pure_dict, nnx.split(block, nnx.Param, SparsityMask)[1:])
        for name, layer in masks["mlp"].items():
            layer["kernel_mask"] = transposable_mask(params["mlp"][name]["kernel"])
        keys = jax.random.split(jax.random.key(1), 3)
        x, dy = (jax.random.normal(key, shape, problem.dtype) for key in keys[:2])
        return params, masks, x, dy, keys[2]

    def run(options):
        def forward_backward(params, masks, x, dy, key):
            def apply(params, x):
                return nnx.merge(graphdef, params, masks)(
                    x,
                    schedule=None,
                    budget=None,
                    kv_mask_BT=None,
                    dropout_key=None,
                    attention_options=_DENSE_ATTENTION,
                    linear_options=options,
                    pruning_key=key,
                    probe=False,
                )[0]

            y, pull = jax.vjp(apply, params, x)
            return y, *pull(dy)

        return forward_backward

    def error(result, expected):
        return relative_error((result[0], result[2]), (expected[0], expected[2]))

    dense = run(DENSE_LINEAR)
    layer = count_transformer_flops(model).layers[0]
    return Case(
        functions={kernel: run(LinearOptions(True, "mvue", kernel)), DENSE: dense},
        args=make_args(),
        reference=run(LinearOptions(True, "mvue", "xla")),
        references={DENSE: dense},
        tolerance=_TOLERANCE,
        error=error,
        flops=dict.fromkeys((kernel, DENSE), (layer.forward + layer.backward) * problem.batch),
    )


def make_step_case(problem: StepProblem, kernel: Implementation) -> Case:
    """Make the training steps, dense and sparse, each on a state of its own.

    Args:
      kernel: implementation of sparse weights.

    Returns:
      Case, a call of which goes from one search for masks to the next.
    """
    config = problem.config()
    vocab_size = config.model.vocab_size or 256
    model = make_transformer_config(
        config, task="language_model", vocab_size=vocab_size, num_classes=0
    )
    recipe = make_recipe(config, model)
    optimizer = make_optimizer(config.optimizer, num_steps=config.num_steps)
    refresh_steps = config.recipe.settings["refresh_steps"]
    length = config.data.sequence_length
    tokens = np.random.default_rng(0).integers(0, vocab_size, (problem.batch, length + 1), np.int32)
    batch = {
        "inputs": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "loss_weights": jnp.ones(problem.batch, jnp.float32),
    }
    sparse, finish = recipe.phases
    options: dict[str, Any] = {"num_steps": refresh_steps, "weight_implementation": kernel}
    calls = {
        name: make_step_call(model, recipe, phase, optimizer, batch, **options)
        for name, phase in {kernel: sparse, DENSE: finish}.items()
    }
    return make_steps_case(calls, num_steps=refresh_steps)


def _seconds(name):
    return lambda record: f"{1e3 * record['values'][name]['median_seconds']:.2f}"


def _kernel(record: Any) -> str:
    values = record["values"].items()
    return next(name for name, value in values if name != DENSE and "absent" not in value)


def _speedup(record: Any) -> float | None:
    return times_faster(record, _kernel(record), DENSE)


def _at(measure: str, model: str):
    def value(record):
        key = record["key"]
        if (key["measure"], key["model"]) != (measure, model) or _kernel(record) != HOPPER:
            return None
        return _speedup(record)

    return value


COLUMNS = (
    Column("what", lambda r: r["key"]["measure"]),
    Column("model", lambda r: r["key"]["model"]),
    Column("sequences", lambda r: str(r["key"]["batch"])),
    Column("kernel", _kernel),
    Column("dense, ms", _seconds(DENSE)),
    Column("sparse, ms", lambda r: _seconds(_kernel(r))(r)),
    Column("speed-up", lambda r: None if (s := _speedup(r)) is None else f"{s:.2f}x"),
)
TARGETS = (
    Target("block of GPT-2 774M 1.2x faster", _at("block", "width 1280"), lambda x: x >= 1.2),
    Target("step of GPT-2 774M 1.1x faster", _at("step", "774m"), lambda x: x >= 1.1),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the points that are missing; write and print table and targets.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.

    Returns:
      int, exit code: 0 if everything agreed with its reference. A missed target is no error.
    """
    parsed = vars(parse_arguments((__doc__ or "").splitlines()[0], arguments))
    device = jax.devices()[0]
    (kernel, *_), absent = choose_kernels(device)

    def make(problem: BlockProblem | StepProblem) -> Case:
        if isinstance(problem, BlockProblem):
            return make_block_case(problem, kernel)._replace(absent=absent)
        return make_step_case(problem, kernel)._replace(absent=absent)

    points = [
        Point(key=problem.key(), make_case=functools.partial(make, problem))
        for problem in list_problems(device.platform, headline=parsed.pop("headline"))
    ]
    failures = run_points("fst_gpt2", points, COLUMNS, **parsed)
    print(evaluate(TARGETS, Results(RESULTS / "fst_gpt2.json").records))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
