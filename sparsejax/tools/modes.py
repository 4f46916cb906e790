"""What `train.py` can do, by name."""

from collections.abc import Mapping
from typing import Any

from sparsejax.config.schema import parse_config
from sparsejax.tools.evaluate import evaluate
from sparsejax.tools.find_decay import find_decay
from sparsejax.tools.plan import format_plan, make_plan
from sparsejax.training.loop import train_and_evaluate


def run_mode(
    mode: str,
    settings: Mapping[str, Any],
    *,
    workdir: str,
    command: str,
    target: str,
) -> None:
    """Do what was asked for, and say what came of it.

    Args:
      mode: "train", "eval", "plan" or "find_decay".
      settings: nested mapping with the keys of `configs/base.py`.
      workdir: str, folder of the run; not used by "plan".
      command: str, what goes on with training when it was stopped.
      target: str, GPU of "plan".

    Raises:
      ConfigError: if a setting has to be changed.
      NonFiniteError: if too many steps in a row were skipped.
    """
    config = parse_config(settings)
    if mode == "plan":
        print(format_plan(make_plan(config, target=target)))
    elif mode == "find_decay":
        find_decay(config, workdir)
    elif mode == "eval":
        for name, value in evaluate(config, settings, workdir).items():
            print(f"{name}: {value}")
    else:
        train_and_evaluate(config, settings, workdir, resume_command=command)
