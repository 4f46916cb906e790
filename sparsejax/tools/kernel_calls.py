"""List the sparse ops that a run of a config calls, for the doctor.

  python -m sparsejax.tools.kernel_calls --config=configs/quickstart.py

Prints one line of JSON: for each op it calls without naming a backend, its name and the static
facts of the call. They are found by tracing the steps: nothing is computed and no data is opened.
"""

import dataclasses
import json
import sys

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
    config_flag = config_flags.DEFINE_config_file("config", None, "Settings.", lock_config=True)
    flags.mark_flags_as_required(["config"])
    try:
        read_settings(argv, flags.FLAGS, config_flag)
        from sparsejax.config.parse import parse_config
        from sparsejax.tools.programs import list_kernel_calls

        calls = list_kernel_calls(parse_config(config_flag.value.to_dict()))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps([{"op": op, "facts": dataclasses.asdict(facts)} for op, facts in calls]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
