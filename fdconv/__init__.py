"""Frequency Dynamic Convolution (FDConv, CVPR 2025) for PyTorch: exact, general, and nothing but torch."""

from .backend import chosen_backend, set_backend
from .config import FDConfig
from .flops import LayerCost, layer_cost
from .layers import FDConv2d, FDLinear
from .weight_reads import NeutralWeightWarning, WeightReadError, strict_weight_reads

__all__ = [
    "FDConfig",
    "FDConv2d",
    "FDLinear",
    "LayerCost",
    "NeutralWeightWarning",
    "WeightReadError",
    "chosen_backend",
    "layer_cost",
    "set_backend",
    "strict_weight_reads",
]
