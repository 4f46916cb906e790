"""The command line that `train.py` and the command `sparsejax` share: from flags to a run."""

import functools
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from sparsejax.config.command_line import list_targets, read_settings
from sparsejax.interrupts import RememberedInterrupt

DATA_PACKAGES = {
    "PIL",
    "array_record",
    "importlib_resources",
    "tensorflow_datasets",
    "tokenizers",
    "tqdm",
}
"""What the extra `data` installs, by the names that are imported."""

try:
    _CONFIG = config_flags.DEFINE_config_file(
        "config", None, "Settings: the name of a config, such as quickstart, or a .py file.",
        lock_config=True,
    )  # fmt: skip
except flags.Error as error:  # it reads the file of --flagfile as soon as it is made
    print(f"error: --flagfile must be a readable file: {error}", file=sys.stderr)
    sys.exit(2)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "plan", "find_decay"], "What to do.")
_DOCTOR = flags.DEFINE_enum("doctor", "auto", ["auto", "off"], "Prove a GPU's kernels before use.")
_PROFILE = flags.DEFINE_string("profile_steps", None, "FIRST:LAST, steps to be profiled.")
_TARGET = flags.DEFINE_enum("target", "h200", list_targets(), "GPU to plan for.")
_HOSTS = flags.DEFINE_integer("hosts", 1, "Machines to plan for, that share the mesh evenly.")


def run(argv: Sequence[str], *, resume_command: str) -> NoReturn:
    """Do what a command line says, and exit.

    Args:
      argv: program and arguments.
      resume_command: shown when a signal stops a run.

    Raises:
      SystemExit: always, with the exit code: 0 done (or stopped by a signal and saved), 1 loss not
        finite or a file not written, 2 a setting has to be changed, 130 interrupted before it
        could save.
    """
    try:
        with RememberedInterrupt() as interrupt:
            main = functools.partial(_main, resume_command=resume_command, interrupt=interrupt)
            app.run(main, argv=list(argv), flags_parser=_parse_flags)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    raise AssertionError("app.run exits")


def describe_options(names: Sequence[str]) -> str:
    """Write options for a person, a line for each.

    Args:
      names: of flags.
    """
    lines = []
    for name in names:
        flag = flags.FLAGS[name]
        default = "" if flag.default is None else f" Default: {flag.default}."
        lines.append(f"  --{name:<9} {flag.help}{default}")
    return "\n".join(lines)


def _main(argv: list[str], *, resume_command: str, interrupt: RememberedInterrupt) -> int:
    import jax  # not before, so that --help does not wait for it

    workdir = _WORKDIR.value or ""
    if len(argv) > 1:
        return _fail(f"unknown argument {argv[1]!r}; settings are given as --config.KEY=VALUE")
    if _PROFILE.value is not None and _MODE.value != "train":
        return _fail(f"--profile_steps must not be given with --mode={_MODE.value}")
    if _HOSTS.present and _MODE.value != "plan":
        return _fail(f"--hosts must not be given with --mode={_MODE.value}")
    if _MODE.value == "plan":
        # Nothing runs on a GPU; and without one, JAX's CUDA plugin loads for compiling only.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    elif not workdir or workdir.startswith("--"):
        return _fail(f"--workdir must be a folder, got {workdir or 'none'}")
    from sparsejax.checkpoint.save import CheckpointError
    from sparsejax.config.parse import ConfigError, describe_unused, parse_config
    from sparsejax.report.progress import say
    from sparsejax.tools.evaluate import evaluate
    from sparsejax.tools.find_decay import find_decay
    from sparsejax.tools.plan import make_plan
    from sparsejax.tools.plan_text import format_plan
    from sparsejax.tools.prove import prove_kernels
    from sparsejax.training.compilation_cache import use_compilation_cache
    from sparsejax.training.loop import NonFiniteError, train_and_evaluate
    from sparsejax.training.profile import StepRange

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every detail of every save
    if _MODE.value != "plan":  # which reads what the compiler says while it compiles
        use_compilation_cache()
    try:
        interrupt.check()
        settings = _CONFIG.value.to_dict()
        config = parse_config(settings)
        if _MODE.value == "plan":
            print(format_plan(make_plan(config, target=_TARGET.value, hosts=_HOSTS.value)))
        elif _MODE.value == "find_decay":
            find_decay(config, workdir)
        elif _MODE.value == "eval":
            for name, value in evaluate(config, workdir).items():
                print(f"{name}: {value}")
        else:
            steps = None if _PROFILE.value is None else StepRange.parse(_PROFILE.value)
            if _DOCTOR.value == "auto":
                prove_kernels(config)
            interrupt.check()
            if unused := describe_unused(settings):
                say(unused)
            train_and_evaluate(config, workdir, resume_command=resume_command, profile_steps=steps)
    except ConfigError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name not in DATA_PACKAGES:
            raise
        source = _CONFIG.value.data.source
        return _fail(f"data.source={source!r} needs {error.name}: install sparsejax[data]")
    except (NonFiniteError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return read_settings(argv, flags.FLAGS, _CONFIG)
    except ValueError as error:
        sys.exit(_fail(str(error)))


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
