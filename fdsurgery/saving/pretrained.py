"""Converted models saved and loaded as transformers' users do it; other models go the way of `fdsurgery.save`."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from ..allowed import no_larger_than
from ..errors import CheckpointError, SurgeryError, near_misses
from ..integrations.transformers.allowed import kernels_in, transformers_config
from ..operators import made_layers
from ..plan import Plan
from ..surroundings import undisturbed
from ..verification import Verification
from ..wrappers import unwrapped
from . import folder as checkpoint
from .atomic import replace_files, scratch_beside
from .card import is_own_card, model_card
from .description import Origin, check_plan, describe, is_description, is_transformers_model

CONFIG = "config.json"
CARD = "README.md"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    plan: Plan | None = None,
    verification: Verification | None = None,
    **kwargs: Any,
) -> Path:
    """Save a converted model so that `from_pretrained` builds it again, in a fresh process and on any device.

    A transformers model becomes a folder as transformers writes it: `config.json` names the dynamic layers with their
    settings, and a model card is added where there is none but an earlier one of ours. `AutoModel...from_pretrained`
    loads it once `fdsurgery` is imported. Other models are saved by `fdsurgery.save`.

    Args:
        model: the converted model, trained or not.
        folder: made if need be. Its other files stay; weights of an earlier save are replaced once all is written.
        plan: kept for the record of which rule swapped what.
        verification: what `verify` measured after the conversion, for the model card.
        **kwargs: passed to transformers' `save_pretrained`, e.g. `max_shard_size`, or to `fdsurgery.save`, e.g.
            `source`.

    Returns:
        The folder.

    Raises:
        CheckpointError: the model has no dynamic layers, the plan or the verification is of another model, or the
            folder cannot be written; it is then as it was.

    Examples:
        >>> import fdsurgery
        >>> from transformers import ResNetConfig, ResNetForImageClassification
        >>> config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
        >>> model = fdsurgery.convert(ResNetForImageClassification(config))
        >>> folder = fdsurgery.save_pretrained(model, "resnet-fdconv")
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'config.json', 'model.safetensors']
    """
    folder = Path(folder)
    with unwrapped(model) as plain_named:
        if not is_transformers_model(plain_named):
            return checkpoint.save(plain_named, folder, plan=plan, **kwargs)
        return _save(plain_named, folder, plan, verification, kwargs)


def _save(
    model: Any, folder: Path, plan: Plan | None, verification: Verification | None, kwargs: dict[str, Any]
) -> Path:
    dynamic = {fqn: one.layer for fqn, one in made_layers(model).items()}
    if not dynamic:
        raise CheckpointError("the model has no dynamic layers; convert it first, or save it as you would without us")
    if kwargs.get("push_to_hub"):
        raise CheckpointError("save_pretrained writes folders; upload the folder, or call model.push_to_hub")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give a folder")
    check_plan(plan, model)
    empty = [fqn for fqn, layer in dynamic.items() if any(tensor.is_meta for tensor in layer.state_dict().values())]
    if empty:
        raise CheckpointError(f"{empty[0]!r} is on the meta device, where weights have no values to be saved")
    if verification is not None and {layer.fqn for layer in verification.layers} != dynamic.keys():
        raise CheckpointError("the verification is not of this model: it is of other layers than are dynamic here")
    describe(model, None if plan is None else Origin.of(plan, model))
    try:
        with scratch_beside(folder) as scratch:
            fresh = scratch / "fresh"
            model.save_pretrained(fresh, **kwargs)
            if not (folder / CARD).exists() or is_own_card((folder / CARD).read_bytes()):
                (fresh / CARD).write_text(model_card(model, plan, verification), encoding="utf-8")
            _put_in_place(fresh, folder)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written: {_first_line(error)}") from error
    return folder


def from_pretrained(folder_or_repo: str | Path, **kwargs: Any) -> nn.Module:
    """Build a converted model again, in eval mode, from what `save_pretrained`, `save` or transformers has written.

    A transformers model comes back in the class it was saved in. For another head, import `fdsurgery` and call that
    class: `AutoModelForSemanticSegmentation.from_pretrained(folder)`.

    Args:
        folder_or_repo: a folder, or a repository of the Hugging Face hub.
        **kwargs: passed to transformers' `from_pretrained`, e.g. `dtype`, `device_map` or `num_labels`; for a folder
            written by `fdsurgery.save`, to `fdsurgery.load`. `revision`, `token`, `cache_dir`, `force_download` and
            `local_files_only` choose what is downloaded.

    Returns:
        The converted model.

    Raises:
        CheckpointError: there is no such folder or repository, it holds no converted model, or it is damaged.
        SourceError: for a folder of `fdsurgery.save`, the library that the model comes from is not installed.

    Examples:
        >>> import fdsurgery
        >>> from transformers import ResNetConfig, ResNetForImageClassification
        >>> config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
        >>> model = fdsurgery.convert(ResNetForImageClassification(config))
        >>> again = fdsurgery.from_pretrained(fdsurgery.save_pretrained(model, "resnet-fdconv"))
        >>> list(fdsurgery.dynamic_layers(again))[0]
        'resnet.encoder.stages.1.layers.0.layer.1.convolution'
    """
    folder = _local(folder_or_repo, {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs})
    config = _read_config(folder)
    if not is_description(config.get("quantization_config")):
        if config and not (folder / checkpoint.DESCRIPTION).exists():
            raise CheckpointError(
                f"{folder} holds a plain model: its {CONFIG} names no dynamic layers; load it with transformers, then "
                "convert it"
            )
        return checkpoint.load(folder, **kwargs)
    model_class = _model_class(folder, config)
    transformers_config({**config, "model_type": model_class.config_class.model_type}, str(folder / CONFIG))
    if "attn_implementation" not in kwargs and (kernels := kernels_in(config)) is not None:
        raise CheckpointError(
            f"{folder / CONFIG}: {kernels} could make transformers fetch code; pass attn_implementation= yourself"
        )
    try:
        with undisturbed(), _bounded(folder):
            model, info = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    except SurgeryError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except Exception as error:  # what a damaged config makes of a constructor can be anything
        raise CheckpointError(f"{folder} cannot be loaded: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(f"{folder}: the weights lack {len(missing)} tensor(s) of the model, {missing[0]!r} first")
    unread = sorted(info["unexpected_keys"])
    if unread:  # transformers only logs it, and a head of the modulation would be gone
        raise CheckpointError(
            f"{folder}: the weights hold {len(unread)} tensor(s) that the model of {CONFIG} does not have, "
            f"{unread[0]!r} first"
        )
    return model


def _bounded(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps what is built to the size of the weights, where they lie as transformers writes them."""
    try:
        from ..checkpoints.files import open_checkpoint  # with its package, which few programs need

        tensors = open_checkpoint(folder).tensors
    except CheckpointError:  # transformers has more ways to name files; it says itself what is wrong with them
        return contextlib.nullcontext()
    values = sum(math.prod(stored.shape) for stored in tensors.values())
    return no_larger_than(len(tensors), values, str(folder / CONFIG))


def _put_in_place(fresh: Path, folder: Path) -> None:
    """Put new files in the place of those of an earlier save; the config last, for without it nothing is loaded."""
    new = {path.name for path in fresh.iterdir()}
    replace_files(fresh, folder, last=CONFIG)
    if any(map(_WEIGHTS.fullmatch, new)):  # else they are of a variant, which stands beside others
        for path in list(folder.iterdir()):
            if path.name not in new and (_WEIGHTS.fullmatch(path.name) or path.name == checkpoint.DESCRIPTION):
                path.unlink()


def _local(folder_or_repo: str | Path, download: dict[str, Any]) -> Path:
    if Path(folder_or_repo).is_dir():
        return Path(folder_or_repo)
    hub = _imported("huggingface_hub")
    try:
        return Path(
            hub.snapshot_download(str(folder_or_repo), allow_patterns=["*.json", "*.safetensors", CARD], **download)
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder_or_repo} is no folder here, and no repository that can be fetched: {_first_line(error)}"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    """The config of a transformers model; empty where there is none."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} cannot be read: it holds a {type(config).__name__}, not a config")
    return config


def _model_class(folder: Path, config: dict[str, Any]) -> Any:
    transformers = _imported("transformers")
    given = config.get("architectures") or [config["quantization_config"].get("model_class")]
    name = str(given[0]) if isinstance(given, list) else repr(given)
    model_class = getattr(transformers, name, None)
    known_class = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if not known_class or getattr(model_class, "config_class", None) is None:
        known = [entry for entry in dir(transformers) if entry.endswith(("Model", "Classification", "Segmentation"))]
        raise CheckpointError(
            f"{folder / CONFIG}: transformers {transformers.__version__} has no model class {name!r}"
            f"{near_misses(name, known)} If the class is your own, call its from_pretrained"
        )
    return model_class


def _imported(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise CheckpointError(f"{library} is not installed ({error}); pip install 'fdsurgery[hf]'") from None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0]
