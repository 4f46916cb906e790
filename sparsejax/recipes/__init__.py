"""Published sparse-training methods, one per file, behind one protocol."""

from sparsejax.recipes.attention.dynamic_attention import (
    DynamicAttentionConfig as DynamicAttentionConfig,
)
from sparsejax.recipes.attention.dynamic_attention import (
    make_dynamic_attention as make_dynamic_attention,
)
from sparsejax.recipes.attention.layer_masks import (
    compute_attention_density as compute_attention_density,
)
from sparsejax.recipes.attention.layer_masks import get_attention_masks as get_attention_masks
from sparsejax.recipes.attention.layer_masks import give_heads_masks as give_heads_masks
from sparsejax.recipes.attention.layer_masks import set_attention_masks as set_attention_masks
from sparsejax.recipes.attention.sat import SatConfig as SatConfig
from sparsejax.recipes.attention.sat import make_sat as make_sat
from sparsejax.recipes.attention.spion import SpionConfig as SpionConfig
from sparsejax.recipes.attention.spion import make_spion as make_spion
from sparsejax.recipes.attention.static_attention import (
    StaticAttentionConfig as StaticAttentionConfig,
)
from sparsejax.recipes.attention.static_attention import (
    make_static_attention as make_static_attention,
)
from sparsejax.recipes.chain import chain as chain
from sparsejax.recipes.chain import list_begun as list_begun
from sparsejax.recipes.dense import make_dense as make_dense
from sparsejax.recipes.dynamic.magnitude import MagnitudeConfig as MagnitudeConfig
from sparsejax.recipes.dynamic.magnitude import make_magnitude as make_magnitude
from sparsejax.recipes.dynamic.mst import MSTConfig as MSTConfig
from sparsejax.recipes.dynamic.mst import make_mst as make_mst
from sparsejax.recipes.dynamic.mst_schedules import mst_schedules as mst_schedules
from sparsejax.recipes.dynamic.rigl import RigLConfig as RigLConfig
from sparsejax.recipes.dynamic.rigl import make_rigl as make_rigl
from sparsejax.recipes.dynamic.set import SETConfig as SETConfig
from sparsejax.recipes.dynamic.set import make_set as make_set
from sparsejax.recipes.dynamic.static_weights import StaticWeightsConfig as StaticWeightsConfig
from sparsejax.recipes.dynamic.static_weights import make_static_weights as make_static_weights
from sparsejax.recipes.nm.fst import FSTConfig as FSTConfig
from sparsejax.recipes.nm.fst import make_fst as make_fst
from sparsejax.recipes.nm.sste import SSTEConfig as SSTEConfig
from sparsejax.recipes.nm.sste import make_sste as make_sste
from sparsejax.recipes.own import RecipeFacts as RecipeFacts
from sparsejax.recipes.recipe import Measured as Measured
from sparsejax.recipes.recipe import Metric as Metric
from sparsejax.recipes.recipe import Observation as Observation
from sparsejax.recipes.recipe import Phase as Phase
from sparsejax.recipes.recipe import Recipe as Recipe
from sparsejax.recipes.recipe import Sparsity as Sparsity
from sparsejax.recipes.recipe import StepAccount as StepAccount
from sparsejax.recipes.recipe import keep_where as keep_where
from sparsejax.recipes.weight_masks import apply_weight_masks as apply_weight_masks
from sparsejax.recipes.weight_masks import compute_weight_density as compute_weight_density
from sparsejax.recipes.weight_masks import get_weight_masks as get_weight_masks
from sparsejax.recipes.weight_masks import map_sparse_weights as map_sparse_weights
from sparsejax.recipes.weight_masks import map_weight_masks as map_weight_masks
