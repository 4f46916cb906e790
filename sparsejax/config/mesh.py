"""How devices share a run: sizes of the mesh, and whether model and batch can be cut so."""

import dataclasses
import math
from collections.abc import Mapping

from sparsejax.checks import check_setting, make_check
from sparsejax.models import GATED_ACTIVATIONS, TransformerConfig, sparse_weight_patterns
from sparsejax.models.config import EMBEDDING, list_weight_shapes
from sparsejax.patterns import NMPattern, WeightBlocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices of all processes share the work; the product of the sizes is their number.

    Attributes:
      data: parts of a batch, each with a whole copy of the state; -1 = the devices that are left.
      fsdp: parts of a batch that share one copy: parameters, masks and moments are cut.
      tensor: parts of heads and feed-forward columns.
      context: parts of the positions; inside attention, further parts of the heads.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self):
        check = make_check("mesh", self)
        check(self.data >= 1 or self.data == -1, "data", "at least 1, or -1 for what is left")
        for name in ("fsdp", "tensor", "context"):
            check(getattr(self, name) >= 1, name, "at least 1")

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each axis, 1 of data if that is left open."""
        return {
            "data": max(self.data, 1),
            "fsdp": self.fsdp,
            "context": self.context,
            "tensor": self.tensor,
        }

    def fits(self, num_devices: int) -> bool:
        """Tell whether the product of the sizes can be the number of devices.

        Args:
          num_devices: of all processes.
        """
        parts = math.prod(self.sizes.values())
        return num_devices % parts == 0 if self.data == -1 else num_devices == parts

    def fit(self, num_devices: int) -> dict[str, int]:
        """Return the size of each axis.

        Args:
          num_devices: of all processes.

        Raises:
          ValueError: if the product is another.

        Example:
          >>> MeshConfig(fsdp=2).fit(8)
          {'data': 4, 'fsdp': 2, 'context': 1, 'tensor': 1}
        """
        sizes = self.sizes
        if self.data == -1:
            sizes["data"] = num_devices // math.prod(sizes.values())
        if not self.fits(num_devices):
            got = " x ".join(f"{name}={getattr(self, name)}" for name in sizes)
            raise ValueError(
                f"mesh must have as many parts as there are devices, {num_devices}, got {got}; "
                "data=-1 takes what is left, and CUDA_VISIBLE_DEVICES can hide GPUs"
            )
        return sizes


def check_parts(
    model: TransformerConfig,
    sizes: Mapping[str, int],
    *,
    batch_size: int,
    num_micro_batches: int,
    prunes_gradients: bool = False,
) -> None:
    """Refuse a mesh that cuts a batch or a model into unequal parts.

    Args:
      model: the model.
      sizes: of the axes of the mesh.
      batch_size: examples of a batch.
      num_micro_batches: its parts.
      prunes_gradients: whether a phase prunes gradients, in groups of four positions.

    Raises:
      ValueError: with the numbers.
    """
    copies, examples = sizes["data"] * sizes["fsdp"], batch_size // num_micro_batches
    check_setting(
        examples % copies == 0,
        "data.batch_size / num_micro_batches",
        f"{batch_size} / {num_micro_batches}",
        f"a multiple of the {copies} devices that mesh.data={sizes['data']} x "
        f"mesh.fsdp={sizes['fsdp']} deal examples to",
    )
    context, tensor = sizes["context"], sizes["tensor"]
    unit = 4 if prunes_gradients and math.prod(sizes.values()) > 1 else 1
    check_setting(
        model.max_length % (unit * context) == 0,
        "data.sequence_length",
        model.max_length,
        f"a multiple of mesh.context={context}"
        + (" x 4 positions, whose gradients are pruned together" if unit > 1 else ""),
    )
    check_setting(
        model.num_heads % (tensor * context) == 0,
        "model.num_heads",
        model.num_heads,
        f"a multiple of mesh.tensor={tensor} x mesh.context={context}",
    )
    divided = {"num_kv_heads": model.num_kv_heads, "mlp_dim": model.mlp_dim}
    for name, value in divided.items():
        check_setting(
            value % tensor == 0, f"model.{name}", value, f"a multiple of mesh.tensor={tensor}"
        )
    if tensor > 1:
        _check_weights(model, tensor)


def _check_weights(model: TransformerConfig, tensor: int) -> None:
    """Refuse parts of sparse weights that do not hold whole groups or blocks."""
    shapes, patterns = list_weight_shapes(model), sparse_weight_patterns(model)
    heads = [model.num_heads, model.num_kv_heads]
    for name, pattern in patterns.items():
        if name == EMBEDDING:
            continue  # kept whole where it does not divide
        rows, columns = 4, 4
        if isinstance(pattern, WeightBlocks):
            rows, columns = pattern.rows, pattern.columns
        elif isinstance(pattern, NMPattern):
            rows = math.lcm(4, pattern.m)
            columns = rows if pattern.transposable else 4
        if name.endswith(("out", "down")):
            lengths, unit = [shapes[name][0]], rows
        elif name.endswith("qkv"):
            lengths, unit = [count * model.head_dim for count in heads], columns
        else:
            gates = 2 if model.mlp_activation in GATED_ACTIVATIONS else 1
            lengths, unit = [shapes[name][1] // gates], columns
        for length in lengths:
            check_setting(
                length % (tensor * unit) == 0,
                "mesh.tensor",
                tensor,
                f"such that {length} rows or columns of {name}={pattern} are cut into whole "
                f"groups or blocks of {unit}",
            )
