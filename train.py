"""Train or evaluate a model, or find out what to train it with.

  python train.py --config=configs/quickstart.py --workdir=runs/quickstart
  python train.py --config=configs/quickstart.py --workdir=runs/quickstart --mode=eval
  python train.py --config=configs/quickstart.py --mode=plan --target=h200
  python train.py --config=configs/fst_small.py --mode=find_decay --workdir=runs/decay

Any setting can be changed with --config.KEY=VALUE; `python -m configs.base` lists them all. The
same workdir resumes. Exit code 2: a setting has to be changed; the message says which.
"""

import os
import shlex
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from sparsejax.config.command_line import list_targets, read_settings

_CONFIG = config_flags.DEFINE_config_file("config", None, "Settings of the run.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and pictures.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "plan", "find_decay"], "What to do.")
_DOCTOR = flags.DEFINE_enum("doctor", "auto", ["auto", "off"], "Prove a GPU's kernels before use.")
_TARGET = flags.DEFINE_enum("target", "h200", list_targets(), "GPU of --mode=plan.")


def main(argv: list[str]) -> int:
    """Run the chosen mode.

    Args:
      argv: the program's name and nothing else.

    Returns:
      Exit code: 0 done (or stopped by a signal and saved), 1 loss not finite or a file not
      written, 2 a setting has to be changed, 130 interrupted before it could save.
    """
    import jax  # not before, so that --help does not wait for it

    workdir = _WORKDIR.value or ""
    if len(argv) > 1:
        return _fail(f"unknown argument {argv[1]!r}; settings are given as --config.KEY=VALUE")
    if _MODE.value == "plan":
        # Nothing runs on a GPU; and without one, JAX's CUDA plugin loads for compiling only.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    elif not workdir:
        return _fail(f"--workdir must be a folder for --mode={_MODE.value}, got none")
    from sparsejax.checkpoint.save import CheckpointError
    from sparsejax.config.parse import ConfigError, parse_config
    from sparsejax.tools.evaluate import evaluate
    from sparsejax.tools.find_decay import find_decay
    from sparsejax.tools.plan import format_plan, make_plan
    from sparsejax.tools.prove import prove_kernels
    from sparsejax.training.loop import NonFiniteError, train_and_evaluate

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every detail of every save
    try:
        config = parse_config(_CONFIG.value.to_dict())
        if _MODE.value == "plan":
            print(format_plan(make_plan(config, target=_TARGET.value)))
        elif _MODE.value == "find_decay":
            find_decay(config, workdir)
        elif _MODE.value == "eval":
            for name, value in evaluate(config, workdir).items():
                print(f"{name}: {value}")
        else:
            if _DOCTOR.value == "auto":
                prove_kernels(config)
            command = shlex.join([sys.executable, *sys.argv])
            train_and_evaluate(config, workdir, resume_command=command)
    except ConfigError as error:
        return _fail(str(error))
    except (NonFiniteError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return read_settings(argv, flags.FLAGS, _CONFIG)
    except ValueError as error:
        sys.exit(_fail(str(error)))


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    app.run(main, flags_parser=_parse_flags)
