"""What GPT-2 with FST exchanges on a mesh of devices, and how long it may take: formulas.

Bytes are those that a device sends in a step, in rings, as NCCL's are. See `docs/scaling.md`.

Letters: L layers, D width, F feed-forward width, V tokens, T positions of a sequence
"""

from typing import NamedTuple

import numpy as np

from sparsejax.accounting.flops import count_transformer_flops
from sparsejax.models import TransformerConfig

BATCH = 512
"""Sequences of a step."""
PEAK_FLOPS, NVLINK_BYTES, NETWORK_BYTES, HOST = 990e12, 450e9, 50e9, 8
"""What is assumed of each GPU: dense bf16, bytes a second to its host's and to others; a host's."""

type Sent = dict[str, float]
"""Part of the traffic -> bytes that a device sends."""

WEIGHTS, GRADIENTS, HEADS, SUMS = (
    "fsdp: weights and gradients",
    "data, context: gradients",
    "context: heads",
    "tensor: activations",
)
PRODUCTS = "products"
AXES = {
    WEIGHTS: {"fsdp"},
    GRADIENTS: {"data", "context"},
    HEADS: {"context"},
    SUMS: {"tensor"},
}


class Mesh(NamedTuple):
    """Sizes of the axes, micro-batches of a step, and its sequences."""

    data: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    micro_batches: int = 16
    batch: int = BATCH

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each axis of the mesh, in its order."""
        return {name: getattr(self, name) for name in ("data", "fsdp", "context", "tensor")}

    @property
    def devices(self) -> int:
        """Their number."""
        return self.data * self.fsdp * self.context * self.tensor

    @property
    def hosts(self) -> int:
        """Machines, as full as can be."""
        return -(-self.devices // HOST)

    @property
    def sequences(self) -> float:
        """Sequences of a device and micro-batch; devices that share one count it whole."""
        return self.batch / (self.data * self.fsdp * self.micro_batches)

    def __str__(self) -> str:
        cut = [f"{name}={size}" for name, size in self.sizes.items() if size > 1]
        return " ".join(cut) or "one device"


def predict(model: TransformerConfig, mesh: Mesh) -> Sent:
    """Predict what a device sends in a step, in bytes.

    Weights travel in bf16, masks of the feed-forward weights in a byte. Every micro-batch gathers
    the layers for each pass, and the table of tokens for look-up and head; gradients come back
    once. Activations of a layer are made again in the backward pass.

    Args:
      model: dense or 2:4 in its feed-forward layers.
      mesh: where it is trained.
    """
    L, D, F, V, T = (
        model.num_layers, model.model_dim, model.mlp_dim, model.vocab_size, model.max_length,
    )  # fmt: skip
    copies = mesh.data * mesh.context
    layers, masks = L * (4 * D * D + 2 * D * F), L * 2 * D * F
    gathered = 2 * (2 * layers + masks) + 2 * 2 * V * D
    gradients = 2 * layers + 2 * 2 * V * D
    # The table of positions has no part in "tensor".
    positions = 2 * T * D
    moved = (gathered + gradients) / mesh.tensor + 2 * positions
    activation = 2 * mesh.sequences * T * D / mesh.context
    sent = {
        WEIGHTS: _share(mesh.fsdp) * moved,
        GRADIENTS: 2 * _share(copies) * gradients / (mesh.tensor * mesh.fsdp),
        HEADS: 12 * L * _share(mesh.context) * activation / mesh.tensor,
        SUMS: 2 * (5 * L + 2) * _share(mesh.tensor) * activation,
    }
    return {name: mesh.micro_batches * size for name, size in sent.items()}


def _share(parts: int) -> float:
    return (parts - 1) / parts


def find_crossing_share(mesh: Mesh, part: str) -> float:
    """Return which share of what a device sends goes to other hosts.

    Of g devices of a ring on one host, one sends to the next host. To each device of an exchange
    goes the same.

    Args:
      mesh: whose hosts are as full as can be.
      part: of the traffic.
    """
    coordinates = np.unravel_index(np.arange(mesh.devices), tuple(mesh.sizes.values()))
    others = [c for c, name in zip(coordinates, mesh.sizes, strict=True) if name not in AXES[part]]
    (ring,) = np.nonzero(np.all([c == 0 for c in others], axis=0))
    here = int((ring < HOST).sum())
    if here == len(ring):
        return 0.0
    return (len(ring) - here) / (len(ring) - 1) if part == HEADS else 1 / here


def predict_seconds(model: TransformerConfig, mesh: Mesh) -> dict[str, float]:
    """Predict how long a step's products take, and what is sent, each by itself.

    Products are those of a dense model, forward and backward, at the peak: what 2:4 products save
    and what is computed again are both left out.

    Args:
      model: what is trained.
      mesh: where.

    Returns:
      dict "products", and each part of the traffic -> seconds.
    """
    flops = count_transformer_flops(model).training * mesh.batch / mesh.devices
    seconds = {PRODUCTS: flops / PEAK_FLOPS}
    for part, size in predict(model, mesh).items():
        crossing = size * find_crossing_share(mesh, part)
        seconds[part] = max(size / NVLINK_BYTES, crossing / NETWORK_BYTES)
    return seconds


def find_balance(model: TransformerConfig, mesh: Mesh, part: str) -> float:
    """Return how many tokens a device needs in a micro-batch for products to outlast a part.

    Args:
      model: what is trained.
      mesh: where.
      part: WEIGHTS or GRADIENTS, which do not grow with the tokens.
    """
    seconds = predict_seconds(model, mesh)
    return mesh.sequences * model.max_length * seconds[part] / seconds[PRODUCTS]


def choose_mesh(devices: int) -> Mesh:
    """Return the mesh that the law is drawn for: fsdp inside a host, data between hosts.

    Four sequences of a device and micro-batch, fewer where a batch has no more, and one at least.

    Args:
      devices: whole hosts.
    """
    batch = max(BATCH, devices)
    parts = max(1, batch // (4 * devices))
    return Mesh(data=devices // HOST, fsdp=HOST, micro_batches=parts, batch=batch)
