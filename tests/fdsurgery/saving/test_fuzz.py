"""Whatever a file says, loading it ends in one message of ours or in a model, and nothing but data is read."""

from __future__ import annotations

import copy
import json
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
import yaml
from safetensors.torch import load_file
from torch import nn

import fdsurgery
from fdsurgery import ModelSource, Plan, SurgeryError
from fdsurgery.recipe import parse_recipe, shipped_recipes

FORBIDDEN = (
    "pickle.find_class",
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "urllib.",
    "ftplib.",
)
_watched: dict[int, list[str]] = {}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(FORBIDDEN) and threading.get_ident() in _watched:
        _watched[threading.get_ident()].append(event)
        raise RuntimeError(f"{event} {arguments}")


@contextmanager
def only_data() -> Iterator[None]:
    """See that nothing is unpickled, fetched or run."""
    if not vars(sys).get("_fdsurgery_audit"):  # a hook stays for the life of the process
        sys.addaudithook(_audit)
        vars(sys)["_fdsurgery_audit"] = True
    seen = _watched.setdefault(threading.get_ident(), [])
    try:
        yield
    finally:
        del _watched[threading.get_ident()]
    assert not seen


def nested(levels: int, kind: type) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value] if kind is list else {"a": value}
    return value


NASTY: list[Callable[[random.Random], Any]] = [
    lambda rng: rng.choice([None, True, False, 0, 1, -1, 2, 3, 7, 64, 1000]),
    lambda rng: rng.choice([2**31, 2**63, 2**64, 10**9, 10**12, 10**30, -(10**30), 10**400]),
    lambda rng: rng.choice([0.0, -0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")]),
    lambda rng: rng.choice(["", " ", "a", "0", "1", "é", "\ud800", "\0", "a" * 100_000, "..", "/etc/passwd", "None"]),
    lambda rng: rng.choice(["x.pth", "hf-hub:timm/resnet18", "local-dir:/tmp", "os.system", "re:(", "*", "fdconv"]),
    lambda rng: rng.choice([[], {}, [[]], [None], {"": None}, [1, 2, 3], {"a": {"b": 1}}, [1] * 5000]),
    lambda rng: nested(rng.choice([3, 30, 300]), rng.choice([list, dict])),
]
KEYS = [
    *(
        "checkpoint_path",
        "pretrained",
        "pretrained_cfg",
        "cache_dir",
        "weights",
        "auto_map",
        "trust_remote_code",
        "name",
    ),
    *("backbone", "use_timm_backbone", "attn_implementation", "", "self", "a b", "\ud800", "format", "model", "device"),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All containers and keys in a document."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def mutated(document: Any, rng: random.Random) -> Any:
    """A document with one to three faults in its structure."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = list(places(document))
        if not found:
            return document
        container, key = rng.choice(found)
        change = rng.randrange(7)
        if change == 0:
            del container[key]
        elif change == 1 and isinstance(container, dict):
            container[rng.choice([*KEYS, f"{key}x", str(key).upper()])] = rng.choice(NASTY)(rng)
        elif change == 2 and isinstance(container, dict):
            container[rng.choice(KEYS)] = container.pop(key)
        elif change == 3:
            other, its = rng.choice(found)
            container[key] = copy.deepcopy(other[its]) if not isinstance(its, int) or its < len(other) else None
        elif change == 4 and isinstance(container[key], (int, float)) and not isinstance(container[key], bool):
            container[key] = container[key] * rng.choice([-1, 0, 2, 3, 10**6]) + rng.choice([0, 1])
        else:
            container[key] = rng.choice(NASTY)(rng)
    return document


def garbled(text: str, rng: random.Random) -> bytes:
    """A text with faults in its bytes."""
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice([1, 2, 5])):
        at = rng.randrange(len(content) + 1)
        change = rng.randrange(5)
        if change == 0:
            del content[at:]
        elif change == 1 and at < len(content):
            content[at] ^= 1 << rng.randrange(8)
        elif change == 2:
            content[at:at] = bytes(
                rng.choice(b'{}[]":,0123456789-eE.\\\n\t\xff\0 ~&*!|>%@') for _ in range(rng.randrange(1, 6))
            )
        elif change == 3:
            del content[at : at + rng.randrange(1, 40)]
        else:
            start = rng.randrange(len(content) + 1)
            content[at:at] = content[start : start + rng.randrange(60)]
        if not content:
            break
    return bytes(content)


def written(document: Any, rng: random.Random) -> bytes:
    """A faulty document as a file, by its structure or by its text."""
    if rng.random() < 0.7:
        return json.dumps(mutated(document, rng)).encode()
    return garbled(json.dumps(document, indent=1), rng)


def ends_well(action: Callable[..., Any], *arguments: Any) -> Any:
    """What the action gives; None after an error of ours, whose message is of a sensible length."""
    try:
        with only_data():
            return action(*arguments)
    except SurgeryError as error:
        assert 10 < len(str(error)) <= 5000, str(error)[:200]
        str(error).encode()  # can be printed
        return None


def timm_document(folder: Path) -> None:
    arguments = {
        "num_classes": 3,
        "global_pool": "max",
        "drop_path_rate": 0.1,
        "act_layer": "gelu",
        "out_indices": None,
    }
    model = fdsurgery.convert(timm.create_model("test_resnet", **arguments), example_inputs=torch.randn(2, 3, 64, 64))
    fdsurgery.save(model, folder, plan=None)


def torchvision_document(folder: Path) -> None:
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=3)
    fdsurgery.convert(model, "generic", example_inputs=torch.randn(2, 3, 64, 64), kernel_num=4)
    fdsurgery.save(model, folder, source=ModelSource("torchvision", "shufflenet_v2_x0_5", {"num_classes": 3}))


def small_config() -> Any:
    return transformers.ResNetConfig(
        depths=[1, 1], hidden_sizes=[32, 64], embedding_size=32, num_labels=3, layer_type="basic"
    )


def transformers_document(folder: Path) -> None:
    fdsurgery.save(fdsurgery.convert(transformers.ResNetForImageClassification(small_config()), kernel_num=4), folder)


def pretrained_document(folder: Path) -> None:
    model = fdsurgery.convert(transformers.ResNetForImageClassification(small_config()), kernel_num=4)
    fdsurgery.save_pretrained(model, folder)


DOCUMENTS = {
    "timm": (timm_document, "fdsurgery.json"),
    "torchvision": (torchvision_document, "fdsurgery.json"),
    "transformers": (transformers_document, "fdsurgery.json"),
    "config.json": (pretrained_document, "config.json"),
}


def try_files(kind: str, folder: Path, seeds: range) -> int:
    make, name = DOCUMENTS[kind]
    make(folder)
    document = json.loads((folder / name).read_text())
    tensors = load_file(folder / "model.safetensors")
    loaded_right = 0
    for seed in seeds:
        rng = random.Random(f"{kind} {seed}")
        (folder / name).write_bytes(written(document, rng))
        model = ends_well(fdsurgery.from_pretrained, folder)
        if model is not None:
            state = model.state_dict()
            assert all(torch.equal(state[key], value) for key, value in tensors.items()), seed
            loaded_right += 1
    return loaded_right


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_mutated_descriptions_end_in_one_message_or_load_right(kind: str, tmp_path: Path) -> None:
    count = 12 if kind == "torchvision" else 40  # its builders take long
    assert 0 < try_files(kind, tmp_path / "saved", range(count)) < count


@pytest.mark.long
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_many_mutated_descriptions(kind: str, tmp_path: Path) -> None:
    more = {"timm": 3000, "torchvision": 500, "transformers": 1500, "config.json": 1500}
    try_files(kind, tmp_path / "saved", range(40, 40 + more[kind]))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(*(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()) for _ in range(3)))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.stem(x).relu()).mean((2, 3)))


def try_plans(seeds: range) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    model = Toy().eval()
    expected, before = model(x), [type(module) for module in model.modules()]
    document = json.loads(json.dumps(fdsurgery.plan(model, example_inputs=x, kernel_num=4).to_dict()))
    applied = 0
    for seed in seeds:
        rng = random.Random(f"plan {seed}")
        faulty = mutated(document, rng)
        plan = ends_well(Plan.from_dict, faulty)
        if plan is None:
            continue
        assert isinstance(str(plan), str) and Plan.from_dict(plan.to_dict()) == plan
        done = ends_well(fdsurgery.apply, plan, model)
        if done is not None:
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
            fdsurgery.restore(model)
            applied += 1
        assert [type(module) for module in model.modules()] == before, seed
    assert applied


def test_mutated_plans_end_in_one_message_or_apply() -> None:
    try_plans(range(100))


@pytest.mark.long
def test_two_thousand_mutated_plans() -> None:
    try_plans(range(100, 2100))


def try_recipes(seeds: range) -> None:
    texts = [file.read_text(encoding="utf-8") for name, file in shipped_recipes().items() if name != "ffn"]
    for seed in seeds:
        rng = random.Random(f"recipe {seed}")
        text = rng.choice(texts)
        if rng.random() < 0.5:
            faulty = garbled(text, rng).decode("utf-8", "replace")
        else:
            faulty = json.dumps(mutated(yaml.safe_load(text), rng))  # JSON is YAML
        ends_well(parse_recipe, faulty)


def test_faulty_recipes_end_in_one_message_or_are_read() -> None:
    try_recipes(range(150))


@pytest.mark.long
def test_two_thousand_faulty_recipes() -> None:
    try_recipes(range(150, 2150))
