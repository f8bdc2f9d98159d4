"""PEFT as a library that puts adapters into models of others."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from ..base import Library

_REMEDIES = {
    "convert": "call merge_and_unload(), convert, and add adapters afterwards",
    "save": "save the adapter by its own save_pretrained, and the model after unload(), or merge_and_unload() where "
    "the adapter can be merged",
}


class Peft(Library):
    """Builds no models. Its LoRA layers stand beside dynamic ones as `lora` has it."""

    name = "peft"
    requirement = "fdsurgery[peft]"
    hooks: ClassVar = {"peft.tuners.lora.model": f"{__package__}.registration:install"}

    def refusal(self, module: nn.Module, step: Literal["convert", "save"]) -> str | None:
        if not self.owns(module):
            return None
        return f"carries a PEFT adapter ({type(module).__name__}); {_REMEDIES[step]}"
