"""What stands in the place of a norm that was folded into the layer before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Folded(nn.Module):
    """Does what a norm did besides: nothing, or in timm's norms dropout and activation.

    Its statistics are those of a norm that does nothing, so that whoever folds norms into layers (`model.fuse()`) folds
    nothing a second time.

    Args:
        norm: its parts are shared.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float
    drop: nn.Module
    act: nn.Module

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.eps = 0.0
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty_like(norm.running_mean), persistent=False)
        self.reset_statistics()
        for name in ("drop", "act"):
            part = getattr(norm, name, None)
            self.add_module(name, part if isinstance(part, nn.Module) else nn.Identity())
        self.train(norm.training)

    def reset_statistics(self) -> None:
        """Fill in what is not saved."""
        for ones, zeros in ((self.weight, self.bias), (self.running_var, self.running_mean)):
            ones.fill_(1)
            zeros.zero_()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Refuse a norm's state, which has nowhere to go: the layer before it holds what another norm was."""
        if f"{prefix}running_mean" in state_dict:
            rest[-1].append(
                f"{prefix.rstrip('.')!r} was a norm, which was folded into the layer before it (fuse_norms), and the "
                "state dict is that of a model where it was not: load it into such a model, and fold afterwards."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.act(self.drop(x))
        return result


def folded_norms(model: nn.Module) -> list[str]:
    """Names of the norms of a model that were folded."""
    return [name for name, module in model.named_modules() if isinstance(module, Folded)]


def is_norm(module: nn.Module) -> bool:
    """True for what has running statistics of channels, and so may be folded."""
    mean, variance = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor) or isinstance(module, Folded):
        return False
    return mean.dim() == 1 and mean.shape == variance.shape
