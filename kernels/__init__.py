"""Triton kernels for EfficientAD. Without Triton, and for tensors that are not on a GPU, each
function computes its plain-torch reference."""

from .conv_relu_pool import conv_relu_pool as conv_relu_pool
from .conv_rows import conv_rows as conv_rows
from .conv_rows import conv_rows_pool as conv_rows_pool
from .distance_map import combined_map as combined_map
from .distance_map import distance_map as distance_map
from .hard_feature_loss import hard_feature_loss as hard_feature_loss
from .quantile import quantile as quantile
from .runtime import runs_on as runs_on
