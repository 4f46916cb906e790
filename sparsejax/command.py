"""The command line that `train.py` and the command `sparsejax` share: from flags to a run."""

import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from sparsejax.config.command_line import list_targets, read_settings
from sparsejax.interrupts import RememberedInterrupt

DATA_PACKAGES = {
    "PIL",
    "array_record",
    "importlib_resources",
    "pyarrow",
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
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval", "generate", "plan", "find_decay"], "What to do."
)
_DOCTOR = flags.DEFINE_enum("doctor", "auto", ["auto", "off"], "Prove a GPU's kernels before use.")
_PROFILE = flags.DEFINE_string("profile_steps", None, "FIRST:LAST, steps to be profiled.")
_TARGET = flags.DEFINE_enum("target", "h200", list_targets(), "GPU to plan for.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes; which, SLURM, Open MPI or Kubernetes says."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of several.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_HOSTS = flags.DEFINE_integer("hosts", 1, "Machines to plan for, that share the mesh evenly.")
_SPLIT = flags.DEFINE_enum(
    "split", None, ["train", "validation", "all"],
    "Of the data: validation unless said otherwise, of --eval_source all.",
)  # fmt: skip
_EVAL_SOURCE = flags.DEFINE_string(
    "eval_source", None, "Other data than the run's, as data.source: text:/path."
)
_CHOICES = flags.DEFINE_string(
    "choices", None, "Multiple choice: a file of JSON, {context, choices, answer} in each line."
)
_PRETRAINED = flags.DEFINE_string(
    "pretrained", None, "A model of another library: folder of transformers, or GGUF file."
)
_PROMPTS = flags.DEFINE_multi_string("prompt", None, "Text to continue")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File with a prompt in each line.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Tokens to add at the most.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of what is drawn; 0 = the likeliest.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest that make up so much.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw from so many of the likeliest.")
_SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn.")
_STOP_TOKEN = flags.DEFINE_integer(
    "stop_token", None, "Id that ends a text, the tokenizer's separator unless given; -1 = none."
)

# Flags of some modes alone.
_USERS = {
    "profile_steps": ("train",),
    "hosts": ("plan",),
    "split": ("eval",),
    "eval_source": ("eval",),
    "choices": ("eval",),
    "pretrained": ("eval", "generate"),
    "config": ("train", "eval", "plan", "find_decay"),
    **dict.fromkeys(("prompt", "prompt_file", "max_new_tokens"), ("generate",)),
    **dict.fromkeys(("temperature", "top_p", "top_k", "seed", "stop_token"), ("generate",)),
}


def run(argv: Sequence[str], *, resume_command: str) -> NoReturn:
    """Do what a command line says, and exit.

    Args:
      argv: program and arguments.
      resume_command: shown when a signal stops a run.

    Raises:
      SystemExit: always, with the exit code: 0 done (or stopped by a signal and saved), 1 loss not
        finite or a file not written, 2 a setting has to be changed, 3 another process of the run is
        gone without a word, 130 interrupted before it could save. Where another process has ended
        for an error, its code.
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
    lines, width = [], max(map(len, names))
    for name in names:
        flag = flags.FLAGS[name]
        default = "" if flag.default is None else f" Default: {flag.default}."
        lines.append(f"  --{name:<{width}} {' '.join(flag.help.split())}{default}")
    return "\n".join(lines)


def _main(argv: list[str], *, resume_command: str, interrupt: RememberedInterrupt) -> int:
    if message := _find_wrong_process_flag():
        return _fail(message)
    import jax  # not before, so that --help does not wait for it

    if _MODE.value == "plan":
        # Nothing runs on a GPU; and without one, JAX's CUDA plugin loads for compiling only.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    from sparsejax import processes

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every detail of every save
    if _DISTRIBUTED.value or _COORDINATOR.value is not None:
        # What asks at each step whether to stop is training; otherwise a signal ends the process.
        jax.config.update("jax_enable_preemption_service", _MODE.value == "train")
        where = f" at {_COORDINATOR.value}" if _COORDINATOR.value else ""
        print(f"note: waiting for all processes{where}, up to 300 s", file=sys.stderr, flush=True)
        # JAX waits without looking at what Python has noted: until it is done, Ctrl-C ends this.
        noted = signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            processes.connect(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        except (ValueError, RuntimeError) as error:
            flag = "--distributed" if _DISTRIBUTED.value else "--coordinator"
            return _fail(f"{flag} must bring the processes together, but JAX says: {_join(error)}")
        finally:
            signal.signal(signal.SIGINT, noted)
    code, message, error = 1, "", None
    try:
        code, message, error = _run_mode(argv, resume_command, interrupt)
    except BaseException as failure:
        if not processes.is_watched():
            raise
        if isinstance(failure, KeyboardInterrupt):
            code, message = 130, "interrupted; the same command goes on from the last checkpoint"
        else:
            traceback.print_exc()
            message = f"{type(failure).__name__}: {_join(failure)}"
        error = failure
    if processes.is_alone(error):
        # Of what JAX does, much goes wrong only because another process has gone.
        may_follow = isinstance(error, jax.errors.JaxRuntimeError)
        processes.fail(message, code, patience=processes.PATIENCE_SECONDS if may_follow else 0)
    if message and processes.is_first():
        print(f"error: {message}", file=sys.stderr)
    processes.leave(code)
    return code


def _find_wrong_process_flag() -> str | None:
    """Return what is wrong with the flags that say which process this is, or None."""
    mode = _MODE.value
    given = {flag.name: flag.value for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)}
    lacking = [f"--{name}" for name, value in given.items() if value is None]
    if _DISTRIBUTED.value or len(lacking) < 3:
        alone = f"--mode={mode}" if mode not in ("train", "eval") else "--choices"
        if alone != "--choices" or _CHOICES.value is not None:
            return f"{alone} must have one process, and no --distributed or --coordinator"
    if _DISTRIBUTED.value and len(lacking) < 3:
        return "--distributed finds out what the other flags say: give it, or those, not both"
    if 0 < len(lacking) < 3:
        together = "--coordinator, --num_processes and --process_id must be given together"
        return f"{together}, got no {' and no '.join(lacking)}"
    if lacking:
        return None
    coordinator, number, index = str(_COORDINATOR.value), _NUM_PROCESSES.value, _PROCESS_ID.value
    port = re.fullmatch(r".+:(\d+)", coordinator)
    if port is None or not 0 < int(port[1]) < 2**16:
        return (
            f"--coordinator must be HOST:PORT of process 0, a port below 65536, got {coordinator!r}"
        )
    if number is None or number < 1:
        return f"--num_processes must be at least 1, got {number}"
    if index is None or not 0 <= index < number:
        return f"--process_id must be from 0 to {number - 1}, got {index}"
    return None


def _find_wrong_flag(argv: list[str]) -> str | None:
    """Return what is wrong with the other flags, or None."""
    mode, workdir = _MODE.value, _WORKDIR.value or ""
    if len(argv) > 1:
        return f"unknown argument {argv[1]!r}; settings are given as --config.KEY=VALUE"
    for name, modes in _USERS.items():
        if flags.FLAGS[name].present and mode not in modes:
            return f"--{name} must not be given with --mode={mode}"
    if _PRETRAINED.value is not None:
        if _WORKDIR.present:
            return "--workdir must not be given with --pretrained: a model comes from one of both"
        if mode == "eval" and _CHOICES.value is None:
            return "--choices must be given to evaluate a model of --pretrained"
    elif mode != "plan" and (not workdir or workdir.startswith("--")):
        return f"--workdir must be a folder, got {workdir or 'none'}"
    for name in ("config", "split", "eval_source"):
        if _CHOICES.value is not None and flags.FLAGS[name].present:
            return f"--{name} must not be given with --choices, which has no use for it"
    if mode == "generate" and _PROMPT_FILE.present == bool(_PROMPTS.value):
        found = "both" if _PROMPT_FILE.present else "neither"
        return f"--prompt or --prompt_file must be given, got {found}"
    return None


def _run_mode(
    argv: list[str], resume_command: str, interrupt: RememberedInterrupt
) -> tuple[int, str, BaseException | None]:
    """Do what the mode says; return the exit code, what to tell and the error behind it."""
    from sparsejax import processes
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

    workdir = _WORKDIR.value or ""
    if _MODE.value != "plan":  # which reads what the compiler says while it compiles
        use_compilation_cache()
    try:
        interrupt.check()
        settings = None if _CONFIG.value is None else _CONFIG.value.to_dict()
        _agree_on_flags(argv, settings)
        # All processes now find the same wrong, and one tells it.
        if message := _find_wrong_flag(argv):
            raise processes.share(ConfigError(message))
        if settings is None:
            _run_without_settings(workdir)
            return 0, "", None
        try:
            config = parse_config(settings)
        except ConfigError as error:
            raise processes.share(error) from error
        if _MODE.value == "plan":
            print(format_plan(make_plan(config, target=_TARGET.value, hosts=_HOSTS.value)))
        elif _MODE.value == "find_decay":
            find_decay(config, workdir)
        elif _MODE.value == "eval":
            found = evaluate(config, workdir, split=_SPLIT.value, source=_EVAL_SOURCE.value)
            _say_all(found)
        else:
            steps = None if _PROFILE.value is None else StepRange.parse(_PROFILE.value)
            if _DOCTOR.value == "auto":
                prove_kernels(config)
            interrupt.check()
            if unused := describe_unused(settings):
                say(unused)
            train_and_evaluate(config, workdir, resume_command=resume_command, profile_steps=steps)
    except ConfigError as error:
        return 2, str(error), error
    except ModuleNotFoundError as error:
        if error.name not in DATA_PACKAGES:
            raise
        user = f"--mode={_MODE.value}"
        if _EVAL_SOURCE.value is not None:
            user = f"--eval_source={_EVAL_SOURCE.value!r}"
        elif _CONFIG.value is not None:
            user = f"data.source={_CONFIG.value.data.source!r}"
        return 2, f"{user} needs {error.name}: install sparsejax[data]", error
    except (NonFiniteError, CheckpointError, OSError) as error:
        return 1, str(error), error
    return 0, "", None


def _run_without_settings(workdir: str) -> None:
    """Do what needs no config: a run has recorded its own, and a pretrained model has none."""
    from sparsejax.tools.choices import evaluate_choices
    from sparsejax.tools.evaluate import evaluate_run
    from sparsejax.tools.generate import load_any, read_prompts, write_texts

    if _MODE.value == "eval" and _CHOICES.value is None:
        _say_all(evaluate_run(workdir, split=_SPLIT.value, source=_EVAL_SOURCE.value))
        return
    if _CHOICES.value is not None:
        _say_all(evaluate_choices(load_any(workdir, _PRETRAINED.value), _CHOICES.value))
        return
    path = _PROMPT_FILE.value
    prompts = _PROMPTS.value or [] if path is None else read_prompts(path)
    text = write_texts(
        load_any(workdir, _PRETRAINED.value),
        prompts,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        top_k=_TOP_K.value,
        seed=_SEED.value,
        stop_token=_STOP_TOKEN.value,
    )
    print(text, flush=True)


def _say_all(values: dict[str, Any]) -> None:
    from sparsejax.report.progress import say

    for name, value in values.items():
        say(f"{name}: {value}")


def _agree_on_flags(argv: list[str], settings: dict[str, Any] | None) -> None:
    """Refuse processes that were started differently."""
    from sparsejax.checkpoint.workdir import require_same

    compared = (_MODE, _WORKDIR, _DOCTOR, _PROFILE, _SPLIT, _EVAL_SOURCE)
    given = {flag.name: flag.value for flag in compared}
    require_same("settings", {"config": settings, "arguments": argv[1:], **given})


def _join(error: BaseException) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(error).split())


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return read_settings(argv, flags.FLAGS, _CONFIG)
    except ValueError as error:
        sys.exit(_fail(str(error)))


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
