"""Weights of other libraries, in and out."""

from sparsejax.pretrained.export import export_hf as export_hf
from sparsejax.pretrained.export import read_masks as read_masks
from sparsejax.pretrained.gguf_file import save_tokenizer as save_tokenizer
from sparsejax.pretrained.load import PretrainedModel as PretrainedModel
from sparsejax.pretrained.load import load_pretrained as load_pretrained
