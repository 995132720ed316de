"""Triton kernels for EfficientAD; one a file, its plain-torch reference beside it.

Importing them needs neither a GPU nor Triton: without Triton, and for tensors that are not on a GPU, each function computes its
reference.
"""

from .conv_relu_pool import conv_relu_pool
from .distance_map import combined_map, distance_map
from .hard_feature_loss import hard_feature_loss
from .quantile import quantile
from .triton_or_not import runs_on

__all__ = ["combined_map", "conv_relu_pool", "distance_map", "hard_feature_loss", "quantile", "runs_on"]
