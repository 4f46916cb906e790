"""Weights of other libraries, in and out."""

from sparsejax.pretrained.load import PretrainedModel as PretrainedModel
from sparsejax.pretrained.load import load_pretrained as load_pretrained
