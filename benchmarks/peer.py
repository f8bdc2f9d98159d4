"""Other people's FDConv in the same bench, from a file that the caller has; nothing of it is kept here."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import types
from pathlib import Path
from typing import Any

from torch import nn

from fdsurgery import Plan


def load_peer(path: Path) -> Any:
    """The public implementation's module, from its `FDConv.py`; it registers with mmcv, which may be absent."""
    if importlib.util.find_spec("mmcv") is None:
        registry = types.SimpleNamespace(register_module=lambda *_, **__: lambda layer: layer)
        sys.modules["mmcv"] = types.ModuleType("mmcv")
        sys.modules["mmcv.cnn"] = types.ModuleType("mmcv.cnn")
        sys.modules["mmcv.cnn"].CONV_LAYERS = registry  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("peer_fdconv", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def convert_to_peer_(model: nn.Module, plan: Plan, peer: Any) -> nn.Module:
    """Put the peer's layer in the place of every convolution that a plan swaps. Changes the model and returns it."""
    for decision in plan.swaps:
        conv: Any = model.get_submodule(decision.site.name)
        with contextlib.redirect_stdout(io.StringIO()):  # it tells its settings
            layer = peer.FDConv(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                conv.padding,
                bias=conv.bias is not None,
                kernel_num=64,
                use_fdconv_if_stride_in=[1, 2],
                use_fbm_for_stride=True,
            )
        parent, _, name = decision.site.name.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return model
