"""The state dicts that a dynamic layer loads: its own, those of the paper's code and of version 0.1, plain layers'."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .modulated_spectrum import ModulatedSpectrum
from .modulation import ZeroInit
from .precision import rescaled
from .spectrum import column_factors


class LoadsStateDicts(ModulatedSpectrum):
    """A dynamic layer as it loads: whatever form a state was saved in is put into the form that the layer stores."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        """Take over a plain layer's state; have a scale, and the bias it came with, if the layer that was saved had."""
        if f"{prefix}weight" in state_dict and f"{prefix}dft_weight" not in state_dict:
            error = self._expect_plain(state_dict, prefix)
            if error is not None:
                rest[-1].append(error)
                return
        if f"{prefix}dft_weight" in state_dict:
            error = self._expect_stored(state_dict, prefix)
            if error is not None:
                rest[-1].append(error)
                return
            if f"{prefix}filter_scale" in state_dict:
                self.expect_scale(bias=f"{prefix}bias" in state_dict)
            else:
                self.filter_scale = None
        elif (
            f"{prefix}bias" in state_dict
        ):  # as left by code that keeps the keys of a plain checkpoint that a model has
            warnings.warn(
                f"the state dict has the bias of the dynamic layer {prefix.rstrip('.') or type(self).__name__!r}, and "
                "neither its dft_weight nor a plain weight: the layer keeps the weight that it has. Leave the weights "
                "of a plain checkpoint in, for dynamic layers take them over",
                stacklevel=2,
            )
        groups = state_dict.get(f"{prefix}frequency_group")
        if isinstance(groups, Tensor) and groups.is_floating_point():  # an average of several, that of one number
            state_dict[f"{prefix}frequency_group"] = groups.round().to(self.frequency_group.dtype)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def _expect_stored(self, state_dict: dict[str, Tensor], prefix: str) -> str | None:
        """Put a state that is stored otherwise, isometrically or as in the paper, into this layer's form; why not.

        What the authors' code and version 0.1 saved has the paper's form, and no `spectrum_scale`.
        """
        for mine, other in (("norm", "bn"), ("bn", "norm")):
            branch = f"{prefix}KSM_Global."
            if getattr(self.KSM_Global, mine, None) is not None and f"{branch}{other}.weight" in state_dict:
                theirs = "batch" if other == "bn" else "rms"
                return (
                    f"{branch}{other}: the checkpoint's modulation has another norm than this layer: convert the model "
                    f"with norm: {theirs}, by a recipe's `with` or convert(model, norm={theirs!r}), or load the "
                    "checkpoint's own folder, which says so (fdsurgery.load)."
                )
        saved = f"{prefix}spectrum_scale" in state_dict
        if saved == (self.spectrum_scale is not None) or self._is_prepared():
            return None
        if self.config.spectrum == "paper":
            return (
                f"{prefix}spectrum_scale: the checkpoint's spectrum is stored isometrically, and this layer's as in "
                "the paper: convert the model with spectrum: isometric, the default."
            )
        for name, factor in self.factors_from_paper().items():
            if (held := state_dict.get(prefix + name)) is not None and not held.is_meta:
                state_dict[prefix + name] = rescaled(held, factor)
        assert self.spectrum_scale is not None
        state_dict[f"{prefix}spectrum_scale"] = torch.full_like(self.spectrum_scale, self._scale()[0])
        return None

    @torch.no_grad()
    def _expect_plain(self, state_dict: dict[str, Tensor], prefix: str) -> str | None:
        """Put what a neutral layer would have saved in the place of a plain weight; why not, if it cannot be."""
        weight = state_dict[f"{prefix}weight"]
        if (misfit := self._plain_misfit(weight, prefix)) is not None:
            return misfit
        if self._is_prepared():
            return f"{prefix}weight: this model was prepared for inference and cannot be loaded into."
        if self.dft_weight.is_meta and not weight.is_meta:  # as with assign=True
            with torch.random.fork_rng(devices=[]):
                self.to_empty(device=weight.device)
                self.reset_modulation()
        self._tell_what_is_lost(prefix)
        heads = {id(tensor) for tensor in self._modulation()}
        own = {name for name in ("dft_weight", "bias", "filter_scale") if name in self._parameters | self._buffers}
        for name, tensor in (*self.named_parameters(), *self.named_buffers()):
            if name not in own:
                state_dict[prefix + name] = torch.zeros_like(tensor) if id(tensor) in heads else tensor.detach()
        state_dict[f"{prefix}dft_weight"] = self._spectra_of(state_dict.pop(f"{prefix}weight"), weight.dtype)
        return None

    def factors_from_paper(self) -> dict[str, Tensor]:
        """What to multiply the paper's numbers by to have those that this layer stores, where they differ.

        Returns:
            By the name within the layer, factors in float64 that broadcast to the tensor.
        """
        if self.config.spectrum == "paper":
            return {}
        _, in_channels, _, k_w = self._kernel_shape()
        one = torch.ones((), dtype=torch.float64, device="cpu")
        found = {"dft_weight": self._paper_scale() / column_factors(in_channels * k_w, *self._scale(), one)}
        branches = {"KSM_Global": self.KSM_Global, "FBM": self.FBM}
        for part, branch in branches.items():
            for name, head in () if branch is None else branch.named_modules():
                if branch is not None and isinstance(head, ZeroInit) and not name.startswith("edges"):
                    found[f"{part}.{name}.weight"] = one / branch.speed
        return found
