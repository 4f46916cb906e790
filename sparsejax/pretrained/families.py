"""The families of models whose weights are read and written."""

from typing import Any

from sparsejax.pretrained.family import Family
from sparsejax.pretrained.llama import LLAMA, MISTRAL

FAMILIES = (LLAMA, MISTRAL)


def find_family(settings: dict[str, Any], origin: str) -> Family:
    """Return the family that config.json names.

    Args:
      settings: those of config.json.
      origin: str, what messages call it.

    Raises:
      ValueError: if it names none or another.
    """
    found = settings.get("architectures")
    known = {family.architecture: family for family in FAMILIES}
    name = found[0] if isinstance(found, list) and len(found) == 1 else found
    if not (isinstance(name, str) and name in known):
        raise ValueError(f"{origin}: architectures must be one of {[*known]}, got {found!r}")
    return known[name]
