"""Frequency Dynamic Convolution (FDConv, CVPR 2025) for PyTorch: exact, general, and nothing but torch."""

from .config import FDConfig
from .functional import set_backend
from .layers import FDConv2d, FDLinear

__all__ = ["FDConfig", "FDConv2d", "FDLinear", "set_backend"]
