"""Which NVIDIA GPU this machine has, asked of the driver: JAX would take hold of it to answer."""

import os
import shutil
import subprocess
from typing import NamedTuple


class Gpu(NamedTuple):
    """The first GPU that programs may use.

    Attributes:
      kind: as the driver and JAX name it, such as "NVIDIA H200".
      driver: version.
      capability: compute capability, such as "9.0".
      count: GPUs that programs may use.
    """

    kind: str
    driver: str
    capability: str
    count: int


def find_gpu() -> Gpu | None:
    """Ask `nvidia-smi`.

    Returns:
      None if there is no such program, it fails, or `CUDA_VISIBLE_DEVICES` hides every GPU.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = "--query-gpu=index,uuid,name,driver_version,compute_cap"
    try:
        asked = subprocess.run(
            [program, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if asked.returncode != 0:
        return None
    rows = [[cell.strip() for cell in line.split(",")] for line in asked.stdout.splitlines()]
    gpus = [row for row in rows if len(row) == 5]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [name.strip() for name in visible.split(",")]
        gpus = [row for name in named for row in gpus if name and _is_named(row, name)]
    if not gpus:
        return None
    _, _, kind, driver, capability = gpus[0]
    return Gpu(kind, driver, capability, len(gpus))


def _is_named(row: list[str], name: str) -> bool:
    return row[0] == name or row[1].startswith(name)
