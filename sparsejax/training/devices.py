"""The devices of a run: how they are arranged, and which examples this process reads for them."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from sparsejax.config.mesh import check_parts
from sparsejax.config.parse import ConfigError
from sparsejax.config.schema import TrainConfig
from sparsejax.models import TransformerConfig
from sparsejax.sharding import make_mesh


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
        check_parts(
            model,
            sizes,
            batch_size=config.data.batch_size,
            num_micro_batches=config.num_micro_batches,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return make_mesh(sizes, devices)


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
