"""The defaults of every run; other configs only change values.

python -m configs.base                          lists every key, its default and its meaning
python -m configs.base optimizer recipe.fst     only those of these sections
"""

import sys
import textwrap
from collections.abc import Sequence

import ml_collections
from ml_collections import config_dict

from sparsejax.config.parse import list_settings


def get_config() -> ml_collections.ConfigDict:
    """Return the defaults as settings that can be changed; lock them so that none is invented."""
    config = ml_collections.ConfigDict()
    for setting in list_settings():
        *sections, name = setting.name.split(".")
        section = config
        for part in sections:
            if part not in section:
                section[part] = ml_collections.ConfigDict()
            section = section[part]
        if setting.optional:
            # Takes None and values of its type.
            section[name] = config_dict.placeholder(setting.type)
        section[name] = setting.default
    return config


def describe_settings(sections: Sequence[str] = ()) -> str:
    """Write keys, defaults and meanings for a person.

    Args:
      sections: only those whose keys begin with one of these; empty for all.
    """
    lines = []
    for setting in list_settings():
        if sections and not any(f"{setting.name}.".startswith(f"{s}.") for s in sections):
            continue
        lines.append(f"{setting.name} = {setting.default!r}")
        lines += textwrap.wrap(setting.meaning, 98, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe_settings(sys.argv[1:]))
