"""The command `sparsejax`, or `python -m sparsejax`: the modes of `train.py`, and the doctor."""

import re
import shlex
import sys
from collections.abc import Sequence
from typing import NamedTuple

from sparsejax.config.shipped import describe_settings, suggest
from sparsejax.version import __version__


class _Command(NamedTuple):
    meaning: str
    # Flags of `sparsejax.command` that it takes; None for a command that is no mode of it.
    options: tuple[str, ...] | None = None
    needs_config: bool = True


_PROMPTS = ("prompt", "prompt_file", "max_new_tokens")
_SAMPLING = ("temperature", "top_p", "top_k", "seed", "stop_token")
_PROCESSES = ("distributed", "coordinator", "num_processes", "process_id")
_COMMANDS = {
    "train": _Command(
        "train a model, or resume its run",
        ("config", "workdir", "doctor", "profile_steps", *_PROCESSES),
    ),
    "eval": _Command(
        "evaluate the newest checkpoint of a run, or a pretrained model",
        ("config", "workdir", "split", "eval_source", "choices", "pretrained", *_PROCESSES),
        needs_config=False,
    ),
    "generate": _Command(
        "continue prompts with the model of a run, or a pretrained one",
        ("workdir", "pretrained", *_PROMPTS, *_SAMPLING),
    ),
    "plan": _Command(
        "memory, largest batch and kernels on GPUs that need not be here",
        ("config", "target", "hosts"),
    ),
    "find-decay": _Command("find the decay rate that recipe fst needs", ("config", "workdir")),
    "settings": _Command("list the settings, or those of some sections"),
    "doctor": _Command("prove the kernels on this machine's GPU, and keep the verdicts"),
}
_USAGES = {
    "config": "--config=CONFIG [--config.KEY=VALUE ...]",
    "workdir": "--workdir=FOLDER",
    "split": "[--split=SPLIT]",
    "eval_source": "[--eval_source=SOURCE]",
    "choices": "[--choices=FILE]",
    "pretrained": "[--pretrained=PATH]",
    "prompt": "--prompt=TEXT ...",
    "prompt_file": "[--prompt_file=FILE]",
    "max_new_tokens": "[--max_new_tokens=N]",
    "temperature": "[--temperature=T]",
    "top_p": "[--top_p=P]",
    "top_k": "[--top_k=K]",
    "seed": "[--seed=N]",
    "stop_token": "[--stop_token=ID]",
    "target": "[--target=GPU]",
    "hosts": "[--hosts=N]",
    "doctor": "[--doctor=off]",
    "profile_steps": "[--profile_steps=FIRST:LAST]",
    "distributed": "[--distributed]",
    "coordinator": "[--coordinator=HOST:PORT",
    "num_processes": "--num_processes=COUNT",
    "process_id": "--process_id=INDEX]",
}
_HELP = ("--help", "-help", "-h")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      arguments: `sys.argv[1:]` if None.

    Returns:
      Exit code; 2 if an argument has to be changed. A mode of `train.py` exits by itself.
    """
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or [""]
    if name in _HELP:
        print(_describe_commands())
        return 0
    if name == "--version":
        print(f"sparsejax {__version__}")
        return 0
    if name not in _COMMANDS:
        given = f"got {name!r}" if name else "got none; see sparsejax --help"
        expected = f"the command must be one of {', '.join(_COMMANDS)}"
        return _fail(f"{expected}, {given}{suggest(name, list(_COMMANDS))}")
    if name == "doctor":
        from pallas_kernels.doctor.__main__ import main as run_doctor

        return run_doctor(rest, program="sparsejax doctor")
    if name == "settings":
        return _list_settings(rest)
    return _run_mode(name, rest)


def _run_mode(name: str, arguments: list[str]) -> int:
    from sparsejax import command

    options = _COMMANDS[name].options or ()
    if not set(_HELP).isdisjoint(arguments):
        usages = [_USAGES[option] for option in options]
        if not _COMMANDS[name].needs_config:
            usages[0] = f"[{usages[0]}]"
        print(f"usage: sparsejax {name} {' '.join(usages)}\n")
        print(f"{_COMMANDS[name].meaning[0].upper()}{_COMMANDS[name].meaning[1:]}.\n")
        print(command.describe_options(options))
        if "config" in options:
            print("\n`sparsejax settings` lists what --config.KEY=VALUE can change.")
        return 0
    for argument in arguments:
        option = re.match(r"--?(\w*)", argument)
        if option and option[1] in {"mode", *_USAGES} - {*options}:
            own = ", ".join(f"--{each}" for each in options)
            return _fail(f"options of sparsejax {name} are {own}, got {argument!r}")
    resume = shlex.join([sys.executable, "-m", "sparsejax", name, *arguments])
    mode = f"--mode={name.replace('-', '_')}"
    command.run([f"sparsejax {name}", mode, *arguments], resume_command=resume)


def _list_settings(sections: list[str]) -> int:
    if not set(_HELP).isdisjoint(sections):
        print("usage: sparsejax settings [SECTION ...], such as optimizer or recipe.fst")
        return 0
    for section in sections:
        if not describe_settings([section]):
            return _fail(f"a section must be that of a setting, such as optimizer, got {section!r}")
    print(describe_settings(sections))
    return 0


def _describe_commands() -> str:
    return "\n".join(
        [
            "usage: sparsejax COMMAND [OPTION ...]\n",
            "Sparse transformer training in JAX.\n",
            *(f"  {name:<11} {command.meaning}" for name, command in _COMMANDS.items()),
            "\n  sparsejax train --config=quickstart --workdir=runs/quickstart",
            "\nsparsejax COMMAND --help lists the options of one command, sparsejax --version says",
            "which version this is.",
        ]
    )


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
