"""What does a configured train step need on a GPU? Answered by compiling it, without the GPU.

    make compile-step CONFIG=configs/gpt2_124m_spion.py
    python -m benchmarks.compile_step --config=configs/gpt2_124m_spion.py [--target=h100]
        [--num-classes=10 --vocab-size=16]

The second form needs the packages of the `compile` extra on its path. Prints one line per phase of
the recipe.
"""

import argparse
import functools
import importlib.util
import os
from collections.abc import Sequence

# The plugin cannot be loaded for running without a GPU, only for compiling.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from pallas_kernels import aot
from sparsejax.training.config import make_recipe, make_transformer_config, parse_config
from sparsejax.training.optimizer import make_optimizer
from sparsejax.training.state import make_abstract_state, make_graphdef
from sparsejax.training.step import make_train_step

_TARGETS = {"h200": aot.H200, "h100": aot.H100}


def compile_phases(settings, *, target: aot.GpuTarget, vocab_size: int, num_classes: int):
    """Compile the train step of every phase of a configured recipe.

    Args:
      settings: nested mapping, as `parse_config` takes it.
      target: GpuTarget.
      vocab_size: int, token ids of the data.
      num_classes: int, labels of the data; 0 for a language model.

    Returns:
      dict phase name -> AotReport.
    """
    config = parse_config(settings)
    task = "classification" if num_classes else "language_model"
    model = make_transformer_config(
        config, task=task, vocab_size=vocab_size, num_classes=num_classes
    )
    recipe, graphdef = make_recipe(config, model), make_graphdef(model)
    optimizer = make_optimizer(config.optimizer, num_steps=config.num_steps)
    shape = (config.data.batch_size, config.data.sequence_length)
    batch = {"inputs": jax.ShapeDtypeStruct(shape, jnp.int32)}
    batch["weights"] = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    if num_classes:
        batch["labels"] = jax.ShapeDtypeStruct(shape[:1], jnp.int32)
        batch["mask"] = jax.ShapeDtypeStruct(shape, jnp.bool_)
    else:
        batch["targets"] = batch["inputs"]
    compile_step = functools.partial(
        aot.compile_for, mesh=aot.make_gpu_mesh(target), donate_argnums=0
    )
    return {
        phase.name: compile_step(
            make_train_step(
                graphdef,
                recipe,
                phase,
                optimizer,
                implementation=config.model.attention_implementation,
                num_micro_batches=config.num_micro_batches,
            ),
            make_abstract_state(model, recipe, optimizer, phase.name),
            batch,
        )
        for phase in recipe.phases
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the memory of each phase's train step.

    Args:
      arguments: list of str, `sys.argv[1:]` if None.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--target", choices=_TARGETS, default="h200")
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--num-classes", type=int, default=0)
    options = parser.parse_args(arguments)
    spec = importlib.util.spec_from_file_location("config", options.config)
    assert spec is not None and spec.loader is not None, "a file's path has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = module.get_config().to_dict()
    vocab_size = settings["model"]["vocab_size"] or options.vocab_size
    target = _TARGETS[options.target]
    reports = compile_phases(
        settings, target=target, vocab_size=vocab_size, num_classes=options.num_classes
    )
    print(f"{options.config} on one {target.name}, {target.memory_bytes / 1e9:.0f} GB\n")
    print("| phase | state and batch, GB | temporary, GB | together, GB |")
    print("| --- | --- | --- | --- |")
    for name, report in reports.items():
        numbers = (report.argument_bytes, report.temp_bytes, report.peak_bytes)
        print(f"| {name} | " + " | ".join(f"{n / 1e9:.2f}" for n in numbers) + " |")


if __name__ == "__main__":
    main()
