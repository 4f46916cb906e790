"""The families of models whose weights are read and written."""

from typing import Any

from sparsejax.checks import check_setting
from sparsejax.models import TransformerConfig
from sparsejax.pretrained.bert import BERT
from sparsejax.pretrained.family import Family
from sparsejax.pretrained.gpt2 import GPT2
from sparsejax.pretrained.llama import LLAMA, MISTRAL

FAMILIES = (LLAMA, MISTRAL, GPT2, BERT)


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


def match_family(config: TransformerConfig) -> Family:
    """Return the family that a model of ours can be written as.

    Raises:
      ValueError: if there is none, with the first setting that is in the way.
    """
    if config.head_transform or not config.causal:
        family = BERT
    else:
        family = LLAMA if config.positions == "rotary" else GPT2
    for name, values in {**family.fixed, **family.list_limits(config)}.items():
        listed = repr(values[0]) if len(values) == 1 else f"one of {values}"
        expected = f"{listed} to be written as {family.architecture}"
        value = getattr(config, name)
        check_setting(value in values, f"model.{name}", value, expected)
    return family
