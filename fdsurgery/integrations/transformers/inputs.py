"""What models of transformers take, as their configurations and the signatures of their forwards tell."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch

from ...inputs import BATCH, USUAL_SIZES, ExampleTensors, Inputs, as_size, distinct, image_channels, setting


def inputs_of(model: Any) -> Iterator[Inputs]:
    """Inputs that a transformers model may take, the most likely first; see `Library.example_inputs`."""
    config, make = model.config, ExampleTensors(model)
    takes = inspect.signature(model.forward).parameters
    declared = setting(config, ("num_channels", "in_channels", "in_chans"))
    channels = distinct([declared if isinstance(declared, int) else None, *image_channels(model)])
    own = as_size(setting(config, ("image_size", "img_size", "pretrain_image_size", "crop_size")))
    patch = as_size(setting(config, ("patch_size", "spatial_patch_size")))
    if "grid_thw" in takes and patch is not None:  # rows of patches, as in the towers of Qwen-VL and GLM-4V
        frames = setting(config, ("temporal_patch_size",)) or 1
        rows = make.floats(BATCH * 64, channels[0] * frames * math.prod(patch))
        yield Inputs((rows,), {"grid_thw": make.rows((1, 8, 8))})
    if "spatial_shapes" in takes and patch is not None:  # padded patches, as in SigLIP 2
        side = int((setting(config, ("num_patches",)) or 256) ** 0.5)
        yield Inputs(
            kwargs={
                "pixel_values": make.floats(BATCH, side * side, channels[0] * math.prod(patch)),
                "pixel_attention_mask": make.ones(BATCH, side * side),
                "spatial_shapes": make.rows((side, side)),
            }
            | _companions(model, takes, make)
        )
    frames = setting(config, ("num_frames", "frames_per_clip"))
    main = str(model.main_input_name)
    name = next((key for key in ("pixel_values", "pixel_values_videos") if key in takes), main)
    if frames is None and name == "pixel_values_videos":
        frames = 2
    for own_channels, size in product(channels, distinct([own, *map(as_size, USUAL_SIZES)])):
        shape = (own_channels, *size)
        companions = _companions(model, takes, make)
        companions |= {key: make.image(*shape) for key in ("prompt_pixel_values", "prompt_masks") if key in takes}
        if isinstance(frames, int) and frames > 1:
            yield Inputs(kwargs={name: make.image(*shape, BATCH, frames)} | companions)
            yield Inputs(kwargs={name: make.image(*shape, frames)} | companions)
        yield Inputs(kwargs={name: make.image(*shape)} | companions)


def _companions(model: Any, takes: Mapping[str, Any], make: ExampleTensors) -> dict[str, Any]:
    """What models for images and text want besides the image."""
    words = 8
    made: dict[str, Any] = {}
    if "input_ids" in takes:
        made["input_ids"] = make.ones(BATCH, words)
        if "bbox" in takes:
            made["bbox"] = torch.zeros_like(make.ones(BATCH, words, 4))
    if "task_inputs" in takes:
        made["task_inputs"] = make.ones(BATCH, getattr(model.config, "task_seq_len", 77))
    return made
