"""What a run is, in words: its model, its phases, its title."""

from pathlib import Path

import jax

from sparsejax.accounting.density import Density, describe_density
from sparsejax.accounting.ledger import FlopsLedger
from sparsejax.accounting.units import format_quantity
from sparsejax.training.setup import Programs, Run
from sparsejax.training.state import TrainState


def describe_model(run: Run, state: TrainState) -> str:
    """Return one line about what is trained on what.

    Args:
      run: the run.
      state: its state.
    """
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    model = run.model_config
    return (
        f"{run.recipe.name}, {format_quantity(num_params)} parameters, {model.num_layers} layers, "
        f"{model.max_length} positions, {run.config.data.source} on "
        f"{run.mesh.size} x {jax.devices()[0].device_kind}{_describe_mesh(run)}"
    )


def _describe_mesh(run: Run) -> str:
    sizes = [f"{name}={size}" for name, size in run.mesh.shape.items() if size > 1]
    return f", {' x '.join(sizes)}" if sizes else ""


def describe_costs(ledger: FlopsLedger, density: Density, programs: Programs) -> str:
    """Return what a step of a phase costs, in one line.

    Args:
      ledger: in the phase.
      density: at its beginning.
      programs: compiled for it.
    """
    flops, dense_flops = ledger.step_flops, ledger.dense_step_flops
    return (
        f"{describe_density(density)}, {format_quantity(flops, 'FLOPs')} per step "
        f"({flops / dense_flops:.0%} of dense), {format_quantity(programs.step_memory_bytes, 'B')} "
        f"per step, compiled once in {programs.compile_seconds:.1f} s"
    )


def make_title(run: Run, workdir: Path) -> str:
    """Name a run above its pictures.

    Args:
      run: the run.
      workdir: its folder.
    """
    return f"{workdir.resolve().name}: {run.recipe.name}"
