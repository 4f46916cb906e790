"""flax.nnx modules that call the sparse ops."""

from pallas_kernels import Choice as Choice
from pallas_kernels import Implementation as Implementation
from pallas_kernels import VerdictsError as VerdictsError
from pallas_kernels import assume_proven as assume_proven
from pallas_kernels import list_backends as list_backends
from pallas_kernels import record_choices as record_choices
from pallas_kernels import use_recorded as use_recorded
from sparsejax.models.attention import AttentionOptions as AttentionOptions
from sparsejax.models.attention import BlockSparseAttention as BlockSparseAttention
from sparsejax.models.attention import apply_rotary as apply_rotary
from sparsejax.models.block_lists import BlockLists as BlockLists
from sparsejax.models.block_lists import make_block_lists as make_block_lists
from sparsejax.models.config import EMBEDDING as EMBEDDING
from sparsejax.models.config import GATED_ACTIVATIONS as GATED_ACTIVATIONS
from sparsejax.models.config import TransformerConfig as TransformerConfig
from sparsejax.models.config import TransformerOptions as TransformerOptions
from sparsejax.models.config import sparse_weight_patterns as sparse_weight_patterns
from sparsejax.models.embedding import SparseEmbed as SparseEmbed
from sparsejax.models.linear import DENSE_LINEAR as DENSE_LINEAR
from sparsejax.models.linear import LinearOptions as LinearOptions
from sparsejax.models.linear import SparseLinear as SparseLinear
from sparsejax.models.mlp import MLP as MLP
from sparsejax.models.transformer import ModelOutput as ModelOutput
from sparsejax.models.transformer import Transformer as Transformer
from sparsejax.models.variables import SparsityMask as SparsityMask
