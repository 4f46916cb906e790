"""Text out of a causal language model, and how likely it finds a text."""

from sparsejax.generation.generate import LoadedModel as LoadedModel
from sparsejax.generation.generate import check_continues as check_continues
from sparsejax.generation.generate import encode_texts as encode_texts
from sparsejax.generation.generate import generate as generate
from sparsejax.generation.scoring import score_continuations as score_continuations
