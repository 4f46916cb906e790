"""The model of a config, which may be a class of somebody's own."""

from flax import nnx

from sparsejax.dotted import find_function
from sparsejax.models.config import TransformerConfig
from sparsejax.models.transformer import Transformer


def make_transformer(config: TransformerConfig, *, rngs: nnx.Rngs) -> Transformer:
    """Make the model of a config: a Transformer, or what `config.own_class` names.

    Args:
      rngs: nnx.Rngs with a `params` stream.

    Raises:
      ValueError: if there is no such class, or it is no subclass of Transformer.
    """
    return find_model_class(config.own_class)(config, rngs=rngs)


def find_model_class(name: str) -> type[Transformer]:
    """Return the class of a model.

    Args:
      name: "module:class" of a subclass of Transformer, or "" for Transformer itself.

    Raises:
      ValueError: if there is no such class, or it is no subclass of Transformer.
    """
    if not name:
        return Transformer
    found = find_function(name, "model.own_class")
    if not (isinstance(found, type) and issubclass(found, Transformer)):
        raise ValueError(
            "model.own_class must be a subclass of sparsejax.models.Transformer, "
            f"got {name!r}, which is {found!r}"
        )
    return found
