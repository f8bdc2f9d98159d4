"""Converted models train in transformers' Trainer and in accelerate as their plain twins do."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import pytest
import timm
import torch
import transformers
from models import small_convnextv2, small_segformer, small_vit
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils import _pytree as pytree

import fdsurgery
from fdconv import FDConv2d, FDLinear

Item = dict[str, Any]

slow = pytest.mark.slow

IMAGE = 64
SAMPLES = 4


@pytest.fixture(autouse=True)
def alone_and_seeded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trainer seeds everything and keeps a state for the process; both stay inside the test."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# The models ----------------------------------------------------------------------------------------------------------


def swin_backbone() -> Any:
    return transformers.SwinConfig(
        image_size=IMAGE,
        embed_dim=24,
        depths=[1, 1, 1],
        num_heads=[2, 2, 4],
        window_size=4,
        out_features=["stage1", "stage2", "stage3"],
    )


def upernet() -> nn.Module:
    config = transformers.UperNetConfig(
        backbone_config=swin_backbone(),
        hidden_size=32,
        auxiliary_in_channels=96,
        auxiliary_channels=16,
        pool_scales=[1, 2],
        num_labels=5,
    )
    return transformers.UperNetForSemanticSegmentation(config)


def mask2former() -> nn.Module:
    backbone = transformers.SwinConfig(
        image_size=IMAGE,
        embed_dim=24,
        depths=[1, 1, 1, 1],
        num_heads=[2, 2, 4, 4],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=64,
        num_queries=6,
        num_labels=5,
        train_num_points=64,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config)


def detr(family: str) -> nn.Module:
    """Its backbone is frozen: of ResNets that are transformers' own, the class finds no stage to train."""
    backbone = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = getattr(transformers, f"{family}Config")(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=5,
        num_labels=5,
        dropout=0.0,
    )
    return getattr(transformers, f"{family}ForObjectDetection")(config)


def conditional_detr() -> nn.Module:
    return detr("ConditionalDetr").requires_grad_(True)


def rt_detr() -> nn.Module:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16,
        hidden_sizes=[32, 48, 64, 64],
        depths=[1, 1, 1, 1],
        layer_type="bottleneck",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        d_model=32,
        encoder_hidden_dim=32,
        encoder_in_channels=[48, 64, 64],
        encoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_in_channels=[32, 32, 32],
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        decoder_layers=2,
        num_queries=8,
        num_denoising=4,
        anchor_image_size=None,
        num_labels=5,
    )
    return transformers.RTDetrForObjectDetection(config)


def a_class() -> Item:
    return {"labels": torch.randint(2, ())}


def a_map() -> Item:
    return {"labels": torch.randint(5, (IMAGE, IMAGE))}


def masks() -> Item:
    """Of one object or two, so that samples differ in their number."""
    classes = torch.randperm(5)[: int(torch.randint(1, 3, ()))]
    return {"class_labels": classes, "mask_labels": (torch.rand(len(classes), IMAGE, IMAGE) > 0.5).float()}


def boxes() -> Item:
    count = int(torch.randint(1, 4, ()))
    centres, sizes = 0.3 + 0.4 * torch.rand(count, 2), 0.1 + 0.4 * torch.rand(count, 2)
    return {"labels": {"class_labels": torch.randint(5, (count,)), "boxes": torch.cat([centres, sizes], 1)}}


@dataclass(frozen=True)
class Task:
    """A model, what its samples are labelled with, and how it is opened again."""

    build: Callable[[], nn.Module]
    label: Callable[[], Item]
    opened_as: Any

    def samples(self) -> list[Item]:
        return [{"pixel_values": torch.randn(3, IMAGE, IMAGE), **self.label()} for _ in range(SAMPLES)]


classification, segmentation, detection = (
    transformers.AutoModelForImageClassification,
    transformers.AutoModelForSemanticSegmentation,
    transformers.AutoModelForObjectDetection,
)
TASKS: dict[str, Task] = {
    "vit": Task(small_vit, a_class, classification),
    "convnextv2": Task(small_convnextv2, a_class, classification),
    "segformer": Task(small_segformer, a_map, segmentation),
    "upernet": Task(upernet, a_map, segmentation),
    "mask2former": Task(mask2former, masks, transformers.AutoModelForUniversalSegmentation),
    "detr": Task(lambda: detr("Detr"), boxes, detection),
    "conditional detr": Task(conditional_detr, boxes, detection),
    "rt-detr": Task(rt_detr, boxes, detection),
}


@functools.cache
def _pair(name: str) -> tuple[Any, Any, list[Item]]:
    torch.manual_seed(0)
    task = TASKS[name]
    samples = task.samples()
    plain = task.build()
    fdsurgery.testing.settle_(plain, collate(samples)["pixel_values"])
    example = {"pixel_values": collate(samples)["pixel_values"]}
    return plain, fdsurgery.convert(copy.deepcopy(plain), example_inputs=example, kernel_num=8), samples


def pair(name: str) -> tuple[Any, Any, list[Item]]:
    """A plain model with weights that hide nothing, what it was converted to, and samples to learn."""
    plain, converted, samples = _pair(name)
    return copy.deepcopy(plain), copy.deepcopy(converted), samples


def collate(samples: list[Item]) -> Item:
    """What can be stacked is; labels that differ in number stay lists."""

    def joined(values: list[Any]) -> Any:
        stackable = isinstance(values[0], Tensor) and len({value.shape for value in values}) == 1
        return torch.stack(values) if stackable else values

    lists = ("class_labels", "mask_labels")
    return {
        key: [sample[key] for sample in samples] if key in lists else joined([sample[key] for sample in samples])
        for key in samples[0]
    }


# Running -------------------------------------------------------------------------------------------------------------


class Recorder(transformers.TrainerCallback):
    """The gradients of the first step, before the optimizer uses them."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}
        self.finite = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        self.finite &= all(bool(gradient.isfinite().all()) for gradient in found.values())
        self.first = self.first or {name: gradient.clone() for name, gradient in found.items()}


class Trainer(transformers.Trainer):
    """Keeps the exact loss of every training step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, **kwargs)
        if model.training:
            self.losses.append((result[0] if return_outputs else result).item())
        return result


def trainer(
    model: nn.Module, samples: list[Item], folder: Path, *, groups: bool = False, callbacks: Any = (), **settings: Any
) -> Trainer:
    chosen: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": SAMPLES,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "max_grad_norm": 0,  # the norm over all gradients is not that of the plain twin
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        **settings,
    }
    arguments = transformers.TrainingArguments(str(folder), **chosen)
    optimizers = (None, None)
    if groups:
        made = torch.optim.AdamW(fdsurgery.param_groups(model, chosen["learning_rate"], chosen["weight_decay"]))
        optimizers = (made, None)
    return Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=samples,
        eval_dataset=samples,
        optimizers=optimizers,
        callbacks=list(callbacks),
    )


def trained(run: Trainer, **arguments: Any) -> Trainer:
    transformers.set_seed(0)  # else the dropout depends on what was drawn before
    run.train(**arguments)
    return run


def dynamic(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (FDConv2d, FDLinear))}


def plain_name(name: str, layers: dict[str, nn.Module]) -> str:
    """The parameter of the plain twin in whose place one of the converted model is."""
    layer = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
    return name if layer is None or name == f"{layer}.bias" else f"{layer}.weight"


@torch.no_grad()
def outputs(model: nn.Module, samples: list[Item]) -> list[Tensor]:
    leaves = pytree.tree_leaves(dict(model.eval()(collate(samples)["pixel_values"])))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def assert_same(found: nn.Module, expected: nn.Module, samples: list[Item]) -> None:
    """Bit for bit in what they hold. Static 1x1 convolutions of a few channels round by how weights are aligned."""
    ours, theirs = expected.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for one, other in zip(outputs(found, samples), outputs(expected, samples), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


LONG = ("mask2former", "rt-detr")


@pytest.mark.parametrize("name", [name if name not in LONG else pytest.param(name, marks=slow) for name in TASKS])
def test_a_model_trains_evaluates_and_loads_as_its_plain_twin(name: str, tmp_path: Path) -> None:
    """With Trainer's own optimizer, and with our groups.

    At conversion the modulation passes no gradient to the input, so that in the first step all that was not swapped has
    the gradient of the plain twin.
    """
    plain, converted, samples = pair(name)
    layers, static = dynamic(converted), Recorder()
    assert layers
    reference = trainer(plain, samples, tmp_path, callbacks=[static], max_steps=1)
    trained(reference)
    for groups in (False, True):
        model, recorder = copy.deepcopy(converted), Recorder()
        run = trainer(model, samples, tmp_path, groups=groups, callbacks=[recorder])
        before = run.evaluate()["eval_loss"]
        trained(run)
        assert run.losses[0] == pytest.approx(reference.losses[0], rel=1e-5)
        assert run.losses[-1] < run.losses[0]
        assert recorder.finite
        expected = {own for own, _ in model.named_parameters() if plain_name(own, layers) in static.first}
        assert recorder.first.keys() == expected
        total = float(torch.stack([gradient.norm() for gradient in static.first.values()]).norm())
        for own in static.first.keys() & recorder.first.keys():
            error = float((recorder.first[own] - static.first[own]).norm())
            assert error <= 1e-3 * max(float(static.first[own].norm()), 1e-3 * total), own  # some are sums that cancel
        assert run.evaluate()["eval_loss"] < before
        for own, layer in layers.items():
            spectrum = model.get_parameter(f"{own}.dft_weight")
            assert torch.equal(spectrum, layer.get_parameter("dft_weight")) != spectrum.requires_grad, own
    run.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").exists()
    loaded = TASKS[name].opened_as.from_pretrained(tmp_path / "saved")
    assert type(loaded) is type(model) and dynamic(loaded).keys() == layers.keys()
    assert_same(loaded, model, samples)


# What Trainer offers -------------------------------------------------------------------------------------------------


def losses(name: str, folder: Path, **settings: Any) -> list[float]:
    _, model, samples = pair(name)
    return trained(trainer(model, samples, folder, groups=True, **settings)).losses


@pytest.mark.parametrize("name", ["vit", "segformer"])
def test_recomputed_activations_change_no_loss(name: str, tmp_path: Path) -> None:
    found = {}
    for recomputed in (False, True):
        _, model, samples = pair(name)
        if not model.supports_gradient_checkpointing:
            pytest.skip("this transformers has no checkpointing for the plain model either")
        calls: list[int] = []
        next(iter(dynamic(model).values())).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        run = trainer(model, samples, tmp_path, groups=True, gradient_checkpointing=recomputed)
        found[recomputed] = trained(run).losses
        assert len(calls) == 4 * (1 + recomputed)
    assert found[True] == pytest.approx(found[False], rel=1e-5)


@pytest.mark.parametrize("name", ["vit", "segformer", *(pytest.param(n, marks=slow) for n in ("convnextv2", "detr"))])
def test_bfloat16_trains_as_float32_does(name: str, tmp_path: Path) -> None:
    expected, found = losses(name, tmp_path), losses(name, tmp_path, bf16=True)
    assert found != expected and found == pytest.approx(expected, rel=0.03)
    assert found[-1] < found[0]


def with_names_of_its_own(model: Any) -> Any:
    """Whose checkpoints Trainer can read.

    transformers saves many models under the names of earlier releases, and Trainer looks for those of the model, finds
    none, and goes on with the weights that it has (https://github.com/huggingface/transformers/issues/48805).
    """
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    return model


@pytest.mark.parametrize("groups", [True, pytest.param(False, marks=slow)], ids=["our groups", "Trainer's optimizer"])
@pytest.mark.parametrize("by", ["names", "folder"])
def test_a_resumed_run_repeats_the_uninterrupted_one(groups: bool, by: str, tmp_path: Path) -> None:
    """With dropout, a schedule, accumulated gradients and samples in random order.

    To the last bit, unless the weights are in other memory, by whose alignment small convolutions round.
    """
    _, converted, samples = pair("segformer")
    if by == "names":
        with_names_of_its_own(converted)
    settings: dict[str, Any] = {
        "groups": groups,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 6,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
    }
    whole = trained(trainer(copy.deepcopy(converted), samples, tmp_path, **settings))
    last = tmp_path / "checkpoint-3"
    assert (last / "model.safetensors").exists() and not list(last.glob("pytorch_model*"))
    again = converted if by == "names" else fdsurgery.from_pretrained(last)
    resumed = trained(trainer(again, samples, tmp_path, **settings), resume_from_checkpoint=str(last))
    assert len(whole.losses) == 12
    assert resumed.losses == (whole.losses[6:] if by == "names" else pytest.approx(whole.losses[6:], rel=1e-6))


def test_the_best_checkpoint_is_kept_and_comes_back(tmp_path: Path) -> None:
    model, samples = with_names_of_its_own(pair("vit")[1]), pair("vit")[2]
    scores, after = iter([0.1, 0.9, 0.5, 0.3]), []

    class Copies(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            after.append(copy.deepcopy(model))

    run = trainer(
        model,
        samples,
        tmp_path,
        callbacks=[Copies()],
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    shapes = []

    def score(prediction: Any) -> dict[str, float]:
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"score": next(scores)}

    run.compute_metrics = score
    trained(run)
    assert shapes == [((SAMPLES, 2), (SAMPLES,))] * 4
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    for found in (model, fdsurgery.from_pretrained(tmp_path / "checkpoint-2")):
        assert_same(found, after[1], samples)


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_an_average_of_the_weights_is_kept_by_a_callback(kind: str, tmp_path: Path) -> None:
    _, model, samples = pair("vit")
    decay, expected = 0.8, {name: p.detach().clone() for name, p in model.named_parameters()}
    if kind == "torch":
        average: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
        average.update_parameters(model)
    else:
        average = timm.utils.ModelEmaV3(model, decay=decay)

    class Average(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            average.update_parameters(model) if kind == "torch" else average.update(model)
            for name, parameter in model.named_parameters():
                expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()

    trained(trainer(model, samples, tmp_path, callbacks=[Average()]))
    averaged = average.module
    for name, parameter in averaged.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-5, atol=1e-6)
    for name, layer in dynamic(averaged).items():
        assert torch.equal(layer.get_buffer("frequency_group"), dynamic(model)[name].get_buffer("frequency_group"))
    fdsurgery.save_pretrained(averaged, tmp_path / "average")
    assert_same(fdsurgery.from_pretrained(tmp_path / "average"), averaged, samples)


def test_what_trainers_own_optimizer_decays(tmp_path: Path) -> None:
    """All that `param_groups` decays, spectra and modulation, and of what that spares the weights of batch norms, as in
    the plain twin, and one scalar more."""
    _, model, samples = pair("rt-detr")
    decayed = set(trainer(model, samples, tmp_path).get_decay_parameter_names(model))
    names = {parameter: name for name, parameter in model.named_parameters()}
    ours: dict[bool, set[str]] = {True: set(), False: set()}
    for group in fdsurgery.param_groups(model, 1.0, 1.0):
        ours[group["weight_decay"] > 0] |= {names[parameter] for parameter in group["params"]}
    assert {f"{layer}.dft_weight" for layer in dynamic(model)} <= ours[True] <= decayed
    batch_norms = {
        f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    }
    within = {name for layer in dynamic(model) for name in ours[False] & decayed if name.startswith(f"{layer}.")}
    assert set() < (ours[False] & decayed) - within <= batch_norms
    assert {name.partition("KSM_Global.")[2] for name in within} == {"relu.scale"}


# accelerate ----------------------------------------------------------------------------------------------------------


def accelerated(folder: Path) -> None:
    """The body of each process: accumulate, step, save the state, step, go back to it, step again."""
    torch.set_num_threads(1)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2)
    model, samples = without_batch_statistics()
    optimizer = torch.optim.SGD(fdsurgery.param_groups(model, 0.05, 0.0), momentum=0.9)
    loader = torch.utils.data.DataLoader(samples, collate_fn=collate)  # one sample at a time
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def epoch() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The gradients, and the parameters that they lead to."""
        optimizer.zero_grad()
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    found = {name: p.grad.clone() for name, p in named(model) if p.grad is not None}
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        return found, {name: p.detach().clone() for name, p in named(model)}

    def named(model: nn.Module) -> Any:
        return accelerator.unwrap_model(model).named_parameters()

    gradients, _ = epoch()
    accelerator.save_state(str(folder / "state"))
    _, second = epoch()
    accelerator.load_state(str(folder / "state"))
    _, repeated = epoch()
    accelerator.save_model(model, str(folder / "weights"), max_shard_size="100KB")
    result = {"processes": accelerator.num_processes, "first": gradients, "second": second, "repeated": repeated}
    torch.save(result, folder / f"{accelerator.process_index}.pt")


def without_batch_statistics() -> tuple[Any, list[Item]]:
    """A convolutional model, whose samples do not see each other, in float64."""
    torch.manual_seed(0)
    task = TASKS["convnextv2"]
    samples = [{**sample, "pixel_values": sample["pixel_values"].double()} for sample in task.samples()]
    model = task.build().double()
    fdsurgery.testing.settle_(model, collate(samples)["pixel_values"])
    example = {"pixel_values": collate(samples)["pixel_values"]}
    model = fdsurgery.convert(model, example_inputs=example, kernel_num=8, norm="rms")
    with torch.no_grad():  # away from neutral, where the gradients of most modulation are zero
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.train(), samples


@slow
def test_accelerate_accumulates_saves_and_resumes_on_two_processes(tmp_path: Path) -> None:
    """Two processes with two samples each, one at a time, are one process with four. Started by torchrun, since
    `accelerate launch --cpu` starts more than one process through MPI only."""
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, __file__, str(tmp_path)], check=True, env=environment, timeout=300)
    model, samples = without_batch_statistics()
    optimizer = torch.optim.SGD(fdsurgery.param_groups(model, 0.05, 0.0), momentum=0.9)
    model(**collate(samples)).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    optimizer.zero_grad()
    model(**collate(samples)).loss.backward()
    optimizer.step()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["processes"] == 2 and found["first"].keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found["first"][name], gradient, rtol=1e-9, atol=1e-12)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found["second"][name], parameter.detach(), rtol=1e-9, atol=1e-12)
            assert torch.equal(found["repeated"][name], found["second"][name])
    assert (tmp_path / "state" / "model.safetensors").exists()
    shards = sorted((tmp_path / "weights").glob("*.safetensors"))
    assert len(shards) > 2
    other, _ = without_batch_statistics()
    accelerate.load_checkpoint_in_model(other, str(tmp_path / "weights"))
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, found["second"][name]), name


if __name__ == "__main__":
    accelerated(Path(sys.argv[1]))
