"""Numbers that the public implementation gave, from layers none of whose parameters is trivial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import assert_close, fdconv2d_reference, fdlinear_reference
from safetensors import safe_open
from torch import Tensor, nn

from fdconv import FDConfig
from fdconv.official import load_layer, official_state

FILES = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Tensors, the state dict among them under its own names, and the config."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    return tensors, {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}, config


def check(layer: nn.Module, tensors: dict[str, Tensor]) -> None:
    x = tensors["input"].clone().requires_grad_()
    y = layer(x)
    assert_close(y, tensors["output"], "golden")
    if "grad_input_of_sum_y2" in tensors:
        y.square().sum().backward()
        assert_close(x.grad, tensors["grad_input_of_sum_y2"], "golden")
        # What flows to the official spectrum, of which ours is a multiple.
        to_official = layer.dft_weight.grad * layer.factors_from_paper()["dft_weight"]
        assert_close(to_official, tensors["grad_dft_weight_of_sum_y2"], "golden")


def test_there_are_golden_files() -> None:
    assert len(FILES) >= 5


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_official_layer_gives_its_own_numbers(path: Path) -> None:
    tensors, state, config = read(path)
    layer = load_layer(state, config, tensors["group_index"])
    assert not layer.training
    check(layer, tensors)
    back = official_state(layer)
    assert set(back) == set(state)
    for name, tensor in state.items():
        torch.testing.assert_close(back[name], tensor, rtol=2e-7, atol=0)  # a rounding at either side


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_wrong_order_is_noticed(path: Path) -> None:
    tensors, state, config = read(path)
    index = tensors["group_index"]
    shuffled = index[:, torch.randperm(index.shape[1], generator=torch.Generator().manual_seed(0))]
    with pytest.raises(AssertionError, match="relative error"):
        check(load_layer(state, config, shuffled), tensors)


def test_without_an_order_an_official_layer_is_nearly_right() -> None:
    """The public order differs from run to run in under 1% of the coefficients of such a layer, all of equal radius."""
    tensors, state, config = read(next(path for path in FILES if path.stem == "conv3x3_64_64"))
    layer = load_layer(state, config)
    sizes = layer.state_dict()["frequency_group"].long().flatten().bincount()
    assert sizes.tolist() == [tensors["group_index"].shape[2]] * config["kernel_num"]
    assert (layer(tensors["input"]) - tensors["output"]).norm() < 0.05 * tensors["output"].norm()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_reference_gives_the_public_numbers(path: Path) -> None:
    """So that what agrees with `reference.py` agrees with the public code; settings read by hand, not by `official`."""
    tensors, state, config = read(path)
    index = tensors["group_index"].long()
    group = torch.full(state["dft_weight"].shape[1:3], -1)
    for number in range(index.shape[1]):
        group[index[0, number], index[1, number]] = number
    state["frequency_group"] = group
    if config["kind"] == "FDLinear":
        y = fdlinear_reference(state, FDConfig(kernel_num=config["kernel_num"], spectrum="paper"), tensors["input"])
    else:
        gate, fbm = config.get("ksm_global_act", "sigmoid"), config["fbm_cfg"]
        y = fdconv2d_reference(
            state,
            FDConfig(
                kernel_num=config["kernel_num"],
                spectrum="paper",
                global_activation=gate,
                kernel_activation=gate,
                local_activation=config.get("ksm_local_act", "sigmoid"),
                bands=fbm["k_list"],
                band_mask="interpolated",
                band_activation=fbm["act"],
                band_lowfreq=fbm["lowfreq_att"],
            ),
            {name: config[name] for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding")},
            tensors["input"],
        )
    assert_close(y, tensors["output"], "golden")


def test_the_padding_mode_is_ignored_as_the_public_code_ignores_it() -> None:
    tensors, state, config = read(next(path for path in FILES if path.stem == "conv3x3_64_64"))
    check(load_layer(state, {**config, "padding_mode": "reflect"}, tensors["group_index"]), tensors)


def test_what_cannot_be_loaded_is_refused() -> None:
    tensors, state, config = read(next(path for path in FILES if path.stem == "conv3x3_32_32_lowfreq_tanh"))
    index = tensors["group_index"]

    def refused(message: str, state: dict[str, Tensor] = state, index: Tensor = index, **changed: Any) -> None:
        with pytest.raises(ValueError, match=message):
            load_layer(state, {**config, **changed}, index)

    refused("kind", kind="Conv2d")
    refused("no 'dft_weight'", state={})
    refused("does not fit", state={name: tensor for name, tensor in state.items() if name != "KSM_Local.norm.bias"})
    refused("does not fit", out_channels=48, index=None)  # type: ignore[arg-type]
    refused(r"shape \(2, 16, ", index=index[:, 1:])
    refused("every coefficient", index=torch.zeros_like(index))
    for name, value in {"param_reduction": 0.5, "att_multi": 1.5, "groups": 2, "linear_mode": True}.items():
        refused(f"{name}.*no counterpart", **{name: value})
    refused("fbm_cfg.spatial_kernel.*5", fbm_cfg={**config["fbm_cfg"], "spatial_kernel": 5})


@pytest.mark.parametrize("wrong", [torch.zeros_like, lambda y: 1.001 * y, lambda y: y * float("nan")])
def test_the_check_itself_can_fail(wrong: Any) -> None:
    tensors, _, _ = read(FILES[0])
    with pytest.raises(AssertionError):
        assert_close(wrong(tensors["output"]), tensors["output"], "golden")
