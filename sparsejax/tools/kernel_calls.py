"""List the sparse ops that a run of a config calls, for the doctor.

  python -m sparsejax.tools.kernel_calls --config=configs/quickstart.py
  python -m sparsejax.tools.kernel_calls - < settings.json

Prints one line of JSON: for each op it calls without naming a backend, its name and the static
facts of the call. They are found by tracing the steps: nothing is computed and no data is opened.
"""

import dataclasses
import json
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from sparsejax.config.command_line import read_settings


def main(argv: list[str]) -> int:
    """Print the calls.

    Args:
      argv: program and arguments.

    Returns:
      Exit code: 0, or 2 if a setting has to be changed.
    """
    try:
        settings = json.load(sys.stdin) if argv[1:] == ["-"] else _read_config(argv)
        from sparsejax.config.parse import parse_config
        from sparsejax.tools.programs import list_kernel_calls

        calls = list_kernel_calls(parse_config(settings))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps([{"op": op, "facts": dataclasses.asdict(facts)} for op, facts in calls]))
    return 0


def _read_config(argv: list[str]) -> dict[str, Any]:
    config = config_flags.DEFINE_config_file("config", None, "Settings.", lock_config=True)
    read_settings(argv, flags.FLAGS, config)
    return config.value.to_dict()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
