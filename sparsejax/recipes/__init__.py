"""Published sparse-training methods, one per file, behind one protocol."""

from sparsejax.recipes.attention_masks import (
    compute_attention_density as compute_attention_density,
)
from sparsejax.recipes.attention_masks import get_attention_masks as get_attention_masks
from sparsejax.recipes.attention_masks import set_attention_masks as set_attention_masks
from sparsejax.recipes.dense import make_dense as make_dense
from sparsejax.recipes.fst import FSTConfig as FSTConfig
from sparsejax.recipes.fst import make_fst as make_fst
from sparsejax.recipes.magnitude import MagnitudeConfig as MagnitudeConfig
from sparsejax.recipes.magnitude import make_magnitude as make_magnitude
from sparsejax.recipes.mst import MSTConfig as MSTConfig
from sparsejax.recipes.mst import make_mst as make_mst
from sparsejax.recipes.recipe import Observation as Observation
from sparsejax.recipes.recipe import Phase as Phase
from sparsejax.recipes.recipe import Recipe as Recipe
from sparsejax.recipes.recipe import Sparsity as Sparsity
from sparsejax.recipes.rigl import RigLConfig as RigLConfig
from sparsejax.recipes.rigl import make_rigl as make_rigl
from sparsejax.recipes.sat import SatConfig as SatConfig
from sparsejax.recipes.sat import make_sat as make_sat
from sparsejax.recipes.set import SETConfig as SETConfig
from sparsejax.recipes.set import make_set as make_set
from sparsejax.recipes.spion import SpionConfig as SpionConfig
from sparsejax.recipes.spion import make_spion as make_spion
from sparsejax.recipes.sste import SSTEConfig as SSTEConfig
from sparsejax.recipes.sste import make_sste as make_sste
from sparsejax.recipes.static import StaticConfig as StaticConfig
from sparsejax.recipes.static import make_static as make_static
from sparsejax.recipes.static_attention import StaticAttentionConfig as StaticAttentionConfig
from sparsejax.recipes.static_attention import make_static_attention as make_static_attention
from sparsejax.recipes.weight_masks import compute_weight_density as compute_weight_density
from sparsejax.recipes.weight_masks import get_weight_masks as get_weight_masks
