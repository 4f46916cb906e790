"""The devices of a run: how they are arranged, what lies where, which examples a process reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.config.mesh import check_parts
from sparsejax.config.parse import ConfigError
from sparsejax.config.schema import TrainConfig, make_recipe
from sparsejax.models import TransformerConfig
from sparsejax.sharding import BATCH, make_mesh, shard_tree
from sparsejax.types import PyTree


def make_run_mesh(
    config: TrainConfig, model: TransformerConfig, devices: Sequence[Any] | None = None
) -> Mesh:
    """Arrange the devices as configured.

    Args:
      config: the settings.
      model: what is trained.
      devices: None = all of all processes.

    Raises:
      ConfigError: if they are more or fewer than the mesh has parts, or the parts would be unequal.
    """
    try:
        sizes = config.mesh.fit(jax.device_count() if devices is None else len(devices))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_run_parts(config, model, sizes)
    return make_mesh(sizes, devices)


def check_run_parts(
    config: TrainConfig, model: TransformerConfig, sizes: Mapping[str, int]
) -> None:
    """Refuse a mesh that cuts the batch or the model into unequal parts.

    Args:
      config: the settings.
      model: what is trained.
      sizes: of the axes of the mesh.

    Raises:
      ConfigError: with the numbers.
    """
    try:
        phases = make_recipe(config, model).phases
        check_parts(
            model,
            sizes,
            batch_size=config.data.batch_size,
            num_micro_batches=config.num_micro_batches,
            prunes_gradients=any(phase.grad_pruning != "none" for phase in phases),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def place_state(state: PyTree, mesh: Mesh) -> PyTree:
    """Say where each leaf of a state lies.

    Args:
      state: of arrays or jax.ShapeDtypeStruct.
      mesh: with the axes of a run.

    Returns:
      tree of jax.ShapeDtypeStruct.
    """
    return _place(state, shard_tree(state, mesh))


def place_arguments(state: PyTree, batch: PyTree, block_lists: PyTree, mesh: Mesh) -> tuple:
    """Say where the arguments of a step lie: examples are dealt out, lists are everywhere.

    Args:
      state: of arrays or jax.ShapeDtypeStruct, and so are the others.
      batch: examples in front.
      block_lists: what the step is given beside them.
      mesh: with the axes of a run.

    Returns:
      tuple of the three, of jax.ShapeDtypeStruct.
    """
    return (
        place_state(state, mesh),
        _place_all(batch, NamedSharding(mesh, P(BATCH))),
        _place_all(block_lists, NamedSharding(mesh, P())),
    )


def place_results(state: PyTree, mesh: Mesh, *, probes: bool = False) -> tuple:
    """Return where the results of a train step lie: the state stays, so that the next step fits.

    Args:
      state: before the step, of arrays or jax.ShapeDtypeStruct.
      mesh: with the axes of a run.
      probes: whether the step returns an observation too.

    Returns:
      tuple for `out_shardings` of `jax.jit`.
    """
    return (shard_tree(state, mesh), *(NamedSharding(mesh, P()),) * (2 if probes else 1))


def _place(tree, shardings):
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _place_all(tree, sharding):
    return _place(tree, jax.tree.map(lambda _: sharding, tree))


def find_share(sharding: NamedSharding, batch_size: int) -> tuple[int, int]:
    """Return which part of a batch this process reads, of how many.

    Processes whose devices hold the same examples, because "context" or "tensor" lies across them,
    read alike.

    Args:
      sharding: of a batch.
      batch_size: examples of a batch.

    Raises:
      ConfigError: if the examples of this process are no part of equal parts.
    """
    parts = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = {part[0].indices(batch_size)[:2] for part in parts if part is not None}
    first, last = min(start for start, _ in rows), max(stop for _, stop in rows)
    size = sum(stop - start for start, stop in rows)
    if size != last - first or first % size or batch_size % size:
        raise ConfigError(
            "mesh must give each process consecutive examples of a batch, in parts of one size, "
            f"got {sorted(rows)} of {batch_size} for process {jax.process_index()}"
        )
    return first // size, batch_size // size
