"""Masks that are 2:4 along rows and along columns."""

from pallas_kernels.transposable_mask.op import transposable_mask as transposable_mask
