"""Models that must be converted at an earlier step of their life, recognised before anything is touched."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import UnsupportedModelError
from ..integrations import refusal_of

_QUANTISED_MODULES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "bitsandbytes.", "auto_gptq.", "awq.")
_PREPARED_MODULES = (
    "torch.ao.nn.qat",
    "torch.ao.nn.intrinsic.qat",
    "torch.ao.quantization.observer",
    "torch.ao.quantization.fake_quantize",
    "torchao.quantization.qat.",
)


def refuse_unsupported(model: nn.Module) -> None:
    """Raise `UnsupportedModelError`, with the remedy, if layers of this model cannot be swapped in place."""
    if not isinstance(model, nn.Module):
        remedy = "; pass its module()" if isinstance(model, torch.export.ExportedProgram) else ""
        raise UnsupportedModelError(f"expected a torch.nn.Module, not {type(model).__name__}{remedy}")
    for refusal in (_wrapped(model), _uninitialised(model), _quantised(model), refusal_of(model, "convert")):
        if refusal is not None:
            raise UnsupportedModelError(refusal)


def _wrapped(model: nn.Module) -> str | None:
    name = type(model).__name__
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return f"the model is wrapped in {name}; convert model.module first, then wrap it"
    if isinstance(model, torch.jit.ScriptModule):
        return "the model is a TorchScript module; convert the Python model it was made from"
    if hasattr(model, "_orig_mod"):
        return "the model is compiled; convert the plain model (model._orig_mod), then call torch.compile"
    # Class names, because importing FSDP is slow and fails where torch was built without distributed support.
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel" or any(
            base.__name__ == "FSDPModule" for base in type(module).__mro__
        ):
            return "the model is sharded by FSDP; convert it first, then shard it"
    for fqn, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            return f"{fqn!r} is a DTensor; convert the model first, then parallelise it"
    return None


def _uninitialised(model: nn.Module) -> str | None:
    for fqn, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            return f"{fqn!r} has no shape yet (a lazy layer); call the model once on real inputs, then convert it"
    return None


def _quantised(model: nn.Module) -> str | None:
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        return "the model is quantised; convert the full-precision model, then quantise it"
    for fqn, module in model.named_modules():
        if type(module).__module__.startswith(_QUANTISED_MODULES):
            return f"{fqn!r} is quantised ({type(module).__name__}); convert the full-precision model, then quantise it"
        if type(module).__module__.startswith(_PREPARED_MODULES):
            return (
                f"the model was prepared for quantisation ({fqn!r} is a {type(module).__name__}), which a swap would "
                "lose; convert the model as it was before, then prepare and quantise it"
            )
    return None
