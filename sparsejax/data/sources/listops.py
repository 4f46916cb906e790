"""Long Range Arena's ListOps, as `data/listops_grammar.py` generates it."""

from sparsejax.data.config import DataConfig
from sparsejax.data.listops_grammar import SYMBOLS
from sparsejax.data.source import Contents, Options, Source

OPTIONS = Options({"validation_split", "listops_examples", "truncate"})


def describe_listops(config: DataConfig) -> Contents:
    """Describe the set without generating it.

    Args:
      config: Settings with `source="listops"` or `"listops:short"`.

    Returns:
      Its contents.
    """
    return Contents("classification", num_values=len(SYMBOLS), num_classes=10)


def open_listops(config: DataConfig) -> Source:
    """Open ListOps, generating it into `data_dir` on first use.

    Args:
      config: Settings with `source="listops"` or `"listops:short"`.

    Returns:
      The set; ids are indices of `SYMBOLS`.

    Raises:
      ValueError: `validation_split` is not a split.
    """
    from sparsejax.data.generated import ListOps, open_generated

    return open_generated(
        config,
        ListOps,
        contents=describe_listops(config),
        variant=config.rest or "full",
        train_examples=config.listops_examples,
        input_key="tokens",
    )
