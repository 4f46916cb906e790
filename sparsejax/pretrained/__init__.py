"""Weights of other libraries, in and out."""

from sparsejax.pretrained.checkpoint import Checkpoint as Checkpoint
from sparsejax.pretrained.export import export_hf as export_hf
from sparsejax.pretrained.export import read_masks as read_masks
from sparsejax.pretrained.gguf_file import save_tokenizer as save_tokenizer
from sparsejax.pretrained.load import PretrainedModel as PretrainedModel
from sparsejax.pretrained.load import load_pretrained as load_pretrained
from sparsejax.pretrained.reading import open_checkpoint as open_checkpoint
from sparsejax.pretrained.reading import read_leaves as read_leaves
from sparsejax.pretrained.reading import read_settings as read_settings
