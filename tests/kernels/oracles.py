"""Softmax maps straight from their definition, in f64."""

import numpy as np


def softmax_maps(q_BTNH, k_BSKH, visible_BTS):
    """Return f64[B, N, T, S] straight from the definition; rows that see nothing are zero."""
    k_BSNH = np.repeat(k_BSKH, q_BTNH.shape[2] // k_BSKH.shape[2], axis=2)
    scores = np.einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH, dtype=np.float64)
    weights = np.exp(scores / q_BTNH.shape[3] ** 0.5) * visible_BTS[:, None]
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total, total, 1)
