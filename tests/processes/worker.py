"""One of the processes that save and restore a checkpoint together.

`save FOLDER OTHER` saves a state to FOLDER and prints what it restores from OTHER;
`fail FOLDER` saves too, but the disk of process 1 is full.
"""

import argparse
import pathlib
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparsejax import processes
from sparsejax.checkpoint import save
from sparsejax.checkpoint.files import find_checkpoints


def make_state():
    """Return leaves of several types, as functions of nothing else."""
    numbers = jnp.arange(64, dtype=jnp.float32)
    return {
        "weights": {"up": jnp.sin(numbers).reshape(16, 4), "bias": jnp.cos(numbers[:3])},
        "moments": (numbers.reshape(8, 8) / 3).astype(jnp.bfloat16),
        "mask": (numbers % 3 == 0).reshape(4, 16),
        "step": jnp.int32(7),
        "nothing": None,
    }


def place(abstract):
    """Return shardings: whole leaves, and leaves dealt out over all devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))

    def place_leaf(leaf):
        divides = leaf.ndim and leaf.shape[0] % mesh.size == 0
        return NamedSharding(mesh, PartitionSpec(*["data"] if divides else []))

    return jax.tree.map(place_leaf, abstract)


def describe(state):
    """Return every bit of a state."""
    host = processes.fetch(state)
    return str(jax.tree.map(lambda x: (str(x.dtype), x.shape, np.asarray(x).tobytes().hex()), host))


def open_checkpoints(folder):
    """Open a folder of checkpoints."""
    return save.Checkpointer(folder, keep_last=2, keep_best=0, run_metadata={})


def restore_newest(folder):
    """Restore the newest checkpoint, dealt out as `place` says."""
    abstract = jax.eval_shape(make_state)
    shardings = place(abstract)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    return save.restore(find_checkpoints(folder)[0], abstract)[0]


def main():
    """Do what the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("save", "fail"))
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("other", type=pathlib.Path, nargs="?")
    for name, kind in (("coordinator", str), ("num_processes", int), ("process_id", int)):
        parser.add_argument(f"--{name}", type=kind)
    args = parser.parse_args()
    processes.connect(args.coordinator, args.num_processes, args.process_id)
    if args.what == "fail" and args.process_id == 1:

        def measure_files(*_arguments, **_options):
            raise OSError(28, "No space left on device")

        save.measure_files = measure_files
    try:
        print(save_and_restore(args.folder, args.other))
    except Exception as error:
        traceback.print_exc()
        processes.fail(str(error), 9)
    processes.leave(0)


def save_and_restore(folder, other):
    """Save a state to a folder, and describe what is restored from another."""
    state = jax.jit(make_state, out_shardings=place(jax.eval_shape(make_state)))()
    assert not state["weights"]["up"].is_fully_addressable
    with open_checkpoints(folder) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state, {"next_index": step}, metadata={})
    return describe(restore_newest(other))


if __name__ == "__main__":
    main()
