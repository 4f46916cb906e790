"""Kill runs at named moments, resume them, and compare all that they leave with unharmed runs.

  python -m benchmarks.kill                 forty runs of all recipes
  python -m benchmarks.kill --runs 200 --seed 1

Each run is a process that sends itself SIGKILL when it comes to a moment for the n-th time, once or
twice, and is then let finish. What is compared with a run that was let alone: every bit of every
checkpoint that is kept, the position in the data, metrics and summary but for the clock, and the
names of all files but for those that chance or the clock decides. Exits with 1 if anything differs.
"""

import argparse
import collections
import functools
import hashlib
import importlib
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.harness import RESULTS
from benchmarks.tiny_runs import RUNS, make_settings
from sparsejax.checkpoint.save import find_checkpoints, restore
from sparsejax.config.parse import parse_config
from sparsejax.report.metrics import read_metrics
from sparsejax.strict_json import dump_json, load_json
from sparsejax.training.loop import train_and_evaluate
from sparsejax.training.setup import prepare_run

_CLOCK = ("seconds", "per_second", "speedup")
# Arrays of Orbax, and events, of which every process begins a file.
_NAMED_BY_CHANCE = re.compile(r"[0-9a-f]{32}|events\.out\.tfevents\..*")


class Moment(NamedTuple):
    """A call in the course of a run.

    Attributes:
      function: "module:name" or "module:class.name", where the caller looks it up.
      after: the kill comes when the call has ended, not when it begins.
    """

    function: str
    after: bool = False


MOMENTS = {
    "the data is opened": Moment("sparsejax.training.setup:make_data"),
    "a checkpoint is read": Moment("sparsejax.training.start:restore", after=True),
    "a phase compiles": Moment("sparsejax.training.loop:compile_phase"),
    "a batch is copied": Moment("sparsejax.training.setup:Run.put_batch"),
    "a row is written": Moment("sparsejax.report.metrics:MetricsWriter.write", after=True),
    "validation": Moment("sparsejax.training.loop:compute_validation"),
    "a phase begins": Moment("sparsejax.training.setup:Run.enter_phase", after=True),
    "a save begins": Moment("sparsejax.checkpoint.save:Checkpointer.save"),
    "a save goes on": Moment("sparsejax.checkpoint.save:Checkpointer.save", after=True),
    "a checkpoint is measured": Moment("sparsejax.checkpoint.save:measure_files", after=True),
    "a file is put in place": Moment("sparsejax.durable:os.fsync"),
    "an old checkpoint is deleted": Moment("sparsejax.checkpoint.save:delete_checkpoint"),
    "pictures are drawn": Moment("sparsejax.training.finish:plot_training"),
}
"""By what a table calls them."""


def fork(function: Callable[[], Any], log: pathlib.Path) -> int:
    """Run a function in a process of its own, which nothing of JAX has started in before.

    Args:
      function: its exceptions end the process with 1, after a traceback.
      log: file that what it prints is appended to.

    Returns:
      The exit code, negative for a signal.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def keep_programs(folder: pathlib.Path) -> None:
    """Let all processes to come compile a program once, and without LLVM's optimisation."""
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _watch(moment: Moment, act: Callable[[], None]) -> None:
    """Let every call of a moment's function act, before it or after it."""
    module, _, path = moment.function.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*args, **kwargs):
        if not moment.after:
            act()
        result = function(*args, **kwargs)
        if moment.after:
            act()
        return result

    setattr(owner, name, call)


def train(settings: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Train to the end."""
    train_and_evaluate(parse_config(settings), workdir, resume_command="the same command")


def train_and_count(
    settings: Mapping[str, Any], workdir: pathlib.Path, counts: pathlib.Path
) -> None:
    """Train to the end, and write how often the run came to each moment."""
    seen = collections.Counter[str]()
    for name, moment in MOMENTS.items():
        _watch(moment, functools.partial(seen.update, [name]))
    train(settings, workdir)
    counts.write_text(dump_json(dict(seen)))


def train_until(
    settings: Mapping[str, Any], workdir: pathlib.Path, moment: Moment, count: int
) -> None:
    """Train until the run has come to a moment so many times, and die there."""
    left = [count]

    def die() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch(moment, die)
    train(settings, workdir)


def describe(settings: Mapping[str, Any], workdir: pathlib.Path, target: pathlib.Path) -> None:
    """Write all that a finished run left, but for what the clock decides.

    Args:
      target: file for a JSON object with "checkpoints", "metrics", "summary", "flops" and "files".
    """
    run = prepare_run(parse_config(settings))
    checkpoints = {}
    for info in find_checkpoints(workdir / "checkpoints"):
        state, data_state = restore(info, run.make_abstract_state(info.metadata["phase"]))
        leaves = jax.tree_util.tree_leaves_with_path(state)
        checkpoints[str(info.step)] = {
            "metadata": info.metadata,
            "metrics": info.metrics,
            "data": data_state,
            "leaves": {jax.tree_util.keystr(path): _hash(leaf) for path, leaf in leaves},
        }
    summary = load_json((workdir / "summary.json").read_bytes())
    left_out = ("workdir", "checkpoint")
    content = {
        "checkpoints": checkpoints,
        "metrics": [_drop_clock(row) for row in read_metrics(workdir / "metrics.jsonl")],
        "summary": _drop_clock({k: v for k, v in summary.items() if k not in left_out}),
        "flops": load_json((workdir / "flops.json").read_bytes()),
        "files": list_names(workdir),
    }
    target.write_text(dump_json(content))


def list_names(folder: pathlib.Path) -> list[str]:
    """List what lies below a folder, but for files that are named by chance or by the clock."""
    found = (path for path in folder.rglob("*") if not _NAMED_BY_CHANCE.fullmatch(path.name))
    return sorted(str(path.relative_to(folder)) for path in found)


def _hash(leaf: jax.Array) -> str:
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return f"{array.dtype}{array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}"


def _drop_clock(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.endswith(_CLOCK)}


def find_differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """List the places where two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted({*one, *other}):
            yield from find_differences(one.get(name), other.get(name), f"{where}/{name}")
    elif repr(one) != repr(other):  # NaN is not equal to itself
        yield f"{where}: {str(other)[:60]} instead of {str(one)[:60]}"


class Kill(NamedTuple):
    """Where one process of a run died.

    Attributes:
      moment: one of `MOMENTS`.
      count: at which of its calls in this process, from 1.
    """

    moment: str
    count: int


def plan_kills(counts: Mapping[str, int], rng: random.Random, first: int) -> list[Kill]:
    """Choose where to kill a run, once or twice.

    Args:
      counts: how often an unharmed run comes to each moment.
      rng: decides.
      first: which moment comes first; of numbers in succession, every moment has its turn.

    Returns:
      list of Kill; a second one may not be reached by what is left of the run.
    """
    names = [name for name in MOMENTS if counts.get(name)]
    if first % (len(names) + 1) == len(names):
        # Only a run that resumes reads a checkpoint.
        half = counts["a batch is copied"] // 2
        return [Kill("a batch is copied", half + 1), Kill("a checkpoint is read", 1)]
    name = names[first % (len(names) + 1)]
    kills = [Kill(name, rng.randint(1, counts[name]))]
    if rng.random() < 0.5:
        name = rng.choice(names)
        kills.append(Kill(name, rng.randint(1, max(1, counts[name] // 2))))
    return kills


def kill_and_resume(
    settings: Mapping[str, Any], folder: pathlib.Path, kills: Sequence[Kill]
) -> list[str]:
    """Train with interruptions and compare with an unharmed run, `folder / "reference.json"`.

    Args:
      folder: for the run, its log and its description.
      kills: where the processes die.

    Returns:
      list of str, what differs.

    Raises:
      RuntimeError: if a process ends otherwise than by a kill or well, with the end of its log.
    """
    workdir, log, found = folder / "run", folder / "log.txt", folder / "found.json"
    for kill in kills:
        die = functools.partial(train_until, settings, workdir, MOMENTS[kill.moment], kill.count)
        code = fork(die, log)
        if code not in (0, -signal.SIGKILL):
            raise RuntimeError(f"killed at {kill}: exit code {code}\n{log.read_text()[-2000:]}")
        _tear_last_row(workdir / "metrics.jsonl")
    for function in (
        functools.partial(train, settings, workdir),
        functools.partial(describe, settings, workdir, found),
    ):
        if code := fork(function, log):
            raise RuntimeError(f"after {kills}: exit code {code}\n{log.read_text()[-2000:]}")
    reference = load_json((folder.parent / "reference.json").read_bytes())
    return list(find_differences(reference, load_json(found.read_bytes())))


def _tear_last_row(path: pathlib.Path) -> None:
    """Leave half a row, as a kill in mid-write does, if the run was not finished."""
    if path.exists() and not (path.parent / "summary.json").exists():
        with path.open("ab") as file:
            file.write(b'{"step": 99, "kin')


def make_reference(settings: Mapping[str, Any], folder: pathlib.Path) -> dict[str, int]:
    """Train without interruption and describe the run in `folder / "reference.json"`.

    Returns:
      dict, how often the run came to each moment.

    Raises:
      RuntimeError: if it fails, with the end of its log.
    """
    workdir, log, counts = folder / "unharmed", folder / "log.txt", folder / "counts.json"
    for function in (
        functools.partial(train_and_count, settings, workdir, counts),
        functools.partial(describe, settings, workdir, folder / "reference.json"),
    ):
        if code := fork(function, log):
            raise RuntimeError(f"unharmed run: exit code {code}\n{log.read_text()[-2000:]}")
    return load_json(counts.read_bytes())


def main(arguments: Sequence[str]) -> int:
    """Kill, resume, compare and print a line for each run.

    Args:
      arguments: of the command line.

    Returns:
      The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill", description=__doc__)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "kill.json")
    options = parser.parse_args(arguments)
    rng, names, records = random.Random(options.seed), list(RUNS), []
    with tempfile.TemporaryDirectory() as directory:
        keep_programs(pathlib.Path(directory) / "programs")
        counts = {}
        for number in range(options.runs):
            name = names[number % len(names)]
            folder = pathlib.Path(directory) / name
            settings_of = functools.partial(make_settings, **RUNS[name])
            if name not in counts:
                folder.mkdir()
                counts[name] = make_reference(settings_of(folder), folder)
            # So that those of each recipe, and those of a round, are different.
            first = number // len(names) + number % len(names)
            kills = plan_kills(counts[name], rng, first)
            run = folder / str(number)
            run.mkdir()
            differences = kill_and_resume(settings_of(folder), run, kills)
            where = ", then ".join(f"{kill.moment} ({kill.count})" for kill in kills)
            print(f"{name:<17} killed: {where}: {'; '.join(differences) or 'equal'}", flush=True)
            records.append({"run": name, "kills": [*map(list, kills)], "differences": differences})
    equal = sum(not record["differences"] for record in records)
    print(f"{equal} of {len(records)} runs ended like those that were let alone")
    options.output.write_text(dump_json({"seed": options.seed, "runs": records}) + "\n")
    return int(equal < len(records))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
