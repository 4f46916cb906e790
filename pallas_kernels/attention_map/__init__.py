"""The softmax map averaged over batch and heads."""

from pallas_kernels.attention_map.op import mean_attention_map as mean_attention_map
