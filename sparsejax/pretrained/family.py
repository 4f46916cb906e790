"""What a family of models in another library is: its settings and tensors as ours, and back."""

from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

from sparsejax.models import TransformerConfig
from sparsejax.pretrained.leaves import Leaf
from sparsejax.pretrained.settings import Settings


class Family(NamedTuple):
    """Models of one architecture.

    Attributes:
      architecture: name of the class in `transformers`.
      model_type: its name in config.json.
      fixed: settings of TransformerConfig that all its models share -> their values, the first of
        which they have when read.
      read_config: returns the other settings of TransformerConfig, max_length that of training.
      write_config: returns the settings of config.json.
      list_leaves: (config, length of training) -> leaves.
      prefix: of the names of tensors, which some files leave out.
      ignored: regular expression of tensors that say nothing, or nothing about language modelling.
      copies: tensors that some files hold again under another name -> the name; of tied heads.
      list_limits: returns settings of a TransformerConfig that its other settings fix -> values.
      has_biases: all models have biases; those of ours without are written with zeros.
    """

    architecture: str
    model_type: str
    fixed: Mapping[str, tuple]
    read_config: Callable[[Settings], dict[str, Any]]
    write_config: Callable[[TransformerConfig], dict[str, Any]]
    list_leaves: Callable[[TransformerConfig, int], list[Leaf]]
    prefix: str = ""
    ignored: str = ""
    copies: Mapping[str, str] = {}
    list_limits: Callable[[TransformerConfig], dict[str, tuple]] = lambda config: {}
    has_biases: bool = False

    def complete(self, name: str, expected: Container[str]) -> str:
        """Return the whole name of a tensor in the spelling of today.

        Args:
          name: in a file.
          expected: names of the tensors that a model has.
        """
        # Of the time when norms were written as in TensorFlow.
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
            if name.endswith(old):
                name = name.removesuffix(old) + new
        whole = self.prefix + name
        return whole if whole in expected else name


PLAIN = {
    "num_decoder_layers": (0,),
    "patch_values": (0,),
    "num_classes": (0,),
    "num_towers": (1,),
    "own_class": ("",),
}
"""What every family shares."""

ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
}
"""Plain activations of `transformers` -> ours."""


def list_head_limits(config: TransformerConfig) -> dict[str, tuple]:
    """Return the limits of families whose heads share the model's width, none of them grouped."""
    return {"num_kv_heads": (config.num_heads,), "qkv_features": (0, config.model_dim)}
