"""Converts a model of every family and tells what became of it.

    python -m benchmarks.zoo [--only TEXT] [--limit N] [--seconds S] [--output DIR]

The smallest model of every timm module, transformers' vision classes with a shallow config, and torchvision's models,
each in a process of its own. What is done already is not done again, so a run that was stopped goes on where it was;
`--again` starts anew. Writes `zoo.jsonl` (a line a model) and `zoo.md` (the table). About an hour on two CPU cores.

Errors are relative, on random weights that are settled first so that nothing hides; where float32 itself is unstable
(above 1e-5), the model is converted once more in float64. torchvision's detectors are compared where their heads write:
what comes after picks boxes by rank, and random scores tie.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
TIMM = Path(__file__).parent / "timm_smallest.json"
TOLERANCE = 1e-5

TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2 "
    "mobilenet_v3_small regnet_y_400mf resnet18 resnet50 shufflenet_v2_x0_5 squeezenet1_0 swin_t swin_v2_t vgg11 "
    "vit_b_16 fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_resnet50_fpn fcos_resnet50_fpn maskrcnn_resnet50_fpn "
    "retinanet_resnet50_fpn ssdlite320_mobilenet_v3_large deeplabv3_mobilenet_v3_large fcn_resnet50 "
    "lraspp_mobilenet_v3_large"
).split()

TRANSFORMERS_MAPPINGS = (
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES",
    "MODEL_FOR_KEYPOINT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TO_IMAGE_MAPPING_NAMES",
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_BACKBONE_MAPPING_NAMES",
)


def specs() -> list[str]:
    """All models, as SPECs."""
    from transformers.models.auto import modeling_auto

    classes: dict[str, None] = {}
    for mapping in TRANSFORMERS_MAPPINGS:
        for name in getattr(modeling_auto, mapping, {}).values():
            classes.update(dict.fromkeys([name] if isinstance(name, str) else name))
    timm_models = [f"timm:{name}" for name in smallest_timm_models().values()]
    return [
        *timm_models,
        *(f"transformers:{name}" for name in classes),
        *(f"torchvision:{name}" for name in TORCHVISION),
    ]


def smallest_timm_models() -> dict[str, str]:
    """The model with the fewest parameters of every timm module; found once, on meta, and kept in a file."""
    if TIMM.exists():
        return dict(json.loads(TIMM.read_text(encoding="utf-8")))
    import timm

    sizes: dict[str, tuple[int, str]] = {}
    for name in timm.list_models():
        with torch.device("meta"):
            try:
                model = timm.create_model(name)
            except Exception:
                continue
        size = sum(parameter.numel() for parameter in model.parameters())
        module = type(model).__module__.rpartition(".")[2]
        module = timm.models._registry._model_to_module.get(name, module)
        sizes[module] = min(sizes.get(module, (size, name)), (size, name))
    found = {module: name for module, (_, name) in sorted(sizes.items())}
    TIMM.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def build(spec: str) -> Any:
    """The model of a SPEC; a transformers class with at most two layers in each stack, if it runs like that."""
    from fdsurgery import DiscoveryError
    from fdsurgery.discovery import observe
    from fdsurgery.saving import source as sources

    library, _, name = spec.partition(":")
    if library != "transformers":
        return sources.build(spec, pretrained=False)[0]
    import transformers

    model_class = getattr(transformers, name)
    try:
        model = model_class(shallow(model_class.config_class())).eval()
        *_, output = observe(model).graph.nodes
        if output.all_input_nodes:  # a backbone whose last layer is gone returns nothing
            return model
    except (DiscoveryError, ValueError, TypeError, IndexError):
        pass
    return model_class(model_class.config_class())  # some read the features of layers by their numbers


def shallow(config: Any) -> Any:
    """A config with one or two layers where it has many, and four frames; parts that are configs too."""
    for key, value in list(vars(config).items()):
        if (key.endswith("_layers") or key == "num_blocks") and type(value) is int:
            setattr(config, key, min(value, 2))
        elif key == "num_frames" and type(value) is int:
            setattr(config, key, min(value, 4))
        elif key == "depths" and isinstance(value, (list, tuple)):
            setattr(config, key, type(value)(min(depth, 1) for depth in value))
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shallow(value)
    return config


def measure(spec: str) -> dict[str, Any]:
    """One row, in this process."""

    import fdsurgery
    from fdsurgery.discovery import observe

    torch.manual_seed(0)
    torch.set_num_threads(1)
    row: dict[str, Any] = {"model": spec}
    model = build(spec).eval()
    seen = observe(model)
    inputs = seen.inputs
    row["tracer"] = seen.tracer
    row["roles"] = dict(Counter(site.role for site in seen.sites))
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    settle(model, inputs)
    generic = fdsurgery.plan(model, "generic", example_inputs=inputs)
    plan = fdsurgery.plan(model, example_inputs=inputs)
    row["recipe"], row["swaps"] = plan.recipe, len(plan.swaps)
    row["generic_swaps"] = len(generic.swaps)
    names = {decision.site.name for decision in plan.swaps}
    row["generic_finds"] = len(names & {decision.site.name for decision in generic.swaps})
    if not plan.swaps:
        return row | {"status": "nothing to convert", "reason": fdsurgery.planning.why_nothing(plan)}
    before = copy.deepcopy(model)
    start = time.perf_counter()
    fdsurgery.apply(plan, model)
    row["seconds"] = round(time.perf_counter() - start, 2)
    row["parameters_added"] = plan.parameters_added
    row["error"] = fdsurgery.verify(Raw(before), Raw(model), inputs).relative_error
    if not row["error"] <= TOLERANCE:
        exact = copy.deepcopy(before).double()
        wide = inputs.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        converted = fdsurgery.apply(plan_for(plan, wide), copy.deepcopy(exact))
        row["error_float64"] = fdsurgery.verify(Raw(exact), Raw(converted), wide).relative_error
    row["gradients"] = gradients(model, inputs)
    if spec.startswith("timm:"):
        row["features_only"] = features_only(spec)
    row["compile"] = compiles(model, inputs)
    good = min(row["error"], row.get("error_float64", 1)) <= TOLERANCE
    return row | {"status": "converted" if good and row["gradients"] == "finite" else "wrong"}


class Raw(torch.nn.Module):
    """A model, or of torchvision's detectors what their head writes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.head = None
        if type(model).__module__.startswith("torchvision.models.detection"):
            self.head = model.rpn.head if hasattr(model, "rpn") else model.head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.head is None:
            return self.model(*args, **kwargs)
        written: list[Any] = []
        handle = self.head.register_forward_hook(lambda module, inputs, output: written.append(output))
        try:
            self.model(*args, **kwargs)
        finally:
            handle.remove()
        return written


def plan_for(plan: Any, inputs: Any) -> Any:
    """The same plan with other example inputs."""
    from dataclasses import replace

    return replace(plan, example_inputs=inputs)


def settle(model: Any, inputs: Any) -> None:
    """`settle_` for a model that may take keywords, or refuse to run in training mode without targets."""

    import fdsurgery

    class Calling(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Any:
            return self.model(*inputs.args, **inputs.kwargs)

    try:
        fdsurgery.testing.settle_(Calling())
    except Exception:  # detectors want targets to train; their norms are frozen anyway
        model.eval()


def gradients(model: Any, inputs: Any) -> str:
    """`finite` if a backward pass in eval mode gives every new parameter that takes part a finite gradient."""
    from torch.utils import _pytree as pytree

    output = model(*inputs.args, **inputs.kwargs)
    tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not tensors:
        return "none"
    # Random weights may blow activations up, and gradients with their square.
    scaled = [tensor.float() / tensor.detach().float().abs().mean().clamp_min(1) for tensor in tensors]
    sum(tensor.square().mean() for tensor in scaled).backward()  # type: ignore[union-attr]
    got = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return "finite" if got and all(bool(gradient.isfinite().all()) for gradient in got) else "not finite"


def features_only(spec: str) -> str:
    """Whether timm's feature extractor of the same architecture converts and agrees."""
    import timm

    import fdsurgery

    name = spec.partition(":")[2]
    try:
        model = timm.create_model(name, features_only=True).eval()
    except Exception:
        return "timm has none"
    try:
        inputs = fdsurgery.discovery.example_inputs(model)
        settle(model, inputs)
        before = copy.deepcopy(model)
        fdsurgery.convert(model, example_inputs=inputs)
        error = fdsurgery.verify(before, model, inputs).relative_error
        if error > 1e-4:  # perhaps of float32 itself
            wide = inputs.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
            converted = fdsurgery.convert(copy.deepcopy(before).double(), example_inputs=wide)
            error = fdsurgery.verify(before.double(), converted, wide).relative_error
        return "agrees" if error <= 1e-4 else f"differs by {error:.0e}"
    except fdsurgery.PlanError:
        return "nothing to convert"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"


def compiles(model: Any, inputs: Any) -> str:
    """Whether `torch.compile(fullgraph=True, backend="eager")` takes the converted model; else, whether the plain."""

    import fdsurgery

    def attempt(candidate: Any) -> str:
        torch._dynamo.reset()
        try:
            with torch.no_grad():
                torch.compile(candidate.eval(), fullgraph=True, backend="eager")(*inputs.args, **inputs.kwargs)
            return ""
        except Exception as error:
            return type(error).__name__

    if not attempt(model):
        return "yes"
    return "no, nor the plain model" if attempt(fdsurgery.restore(copy.deepcopy(model))) else "no"


def run(name: str, spec: str, seconds: float) -> dict[str, Any]:
    """One row, measured in a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--one", spec]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"model": spec, "status": "out of time", "reason": f"more than {seconds:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    reason = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
    return {"model": spec, "status": "failed", "reason": reason[0][:300]}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, with a summary by source."""
    lines = [f"Measured on {date.today().isoformat()} by `python -m benchmarks.zoo`.", ""]
    lines += ["| source | models | converted | nothing to convert | others | observed on meta | worst error |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for library in ("timm", "transformers", "torchvision"):
        own = [row for row in rows if row["model"].startswith(library + ":")]
        status = Counter(row["status"] for row in own)
        errors = [min(row["error"], row.get("error_float64", row["error"])) for row in own if "error" in row]
        others = len(own) - status["converted"] - status["nothing to convert"]
        on_meta = sum(row.get("tracer") == "meta" for row in own)
        worst = f"{max(errors):.0e}" if errors else ""
        lines += [
            f"| {library} | {len(own)} | {status['converted']} | {status['nothing to convert']} | {others} | {on_meta} "
            f"| {worst} |"
        ]
    finds = sum(row.get("generic_finds", 0) for row in rows)
    swaps = sum(row.get("swaps", 0) for row in rows if row.get("recipe") != "generic")
    finds -= sum(row.get("generic_finds", 0) for row in rows if row.get("recipe") == "generic")
    if swaps:
        lines += ["", f"Of the {swaps} swaps of curated recipes, `generic` finds {finds} ({finds / swaps:.1%})."]
    lines += [
        "",
        "| model | sites by role | recipe | swaps | added | error | gradients | features_only | compile | s | |",
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        error = f"{row['error']:.0e}" if "error" in row else ""
        error += f" (float64: {row['error_float64']:.0e})" if "error_float64" in row else ""
        note = "" if row["status"] == "converted" else f"{row['status']}: {row.get('reason', '')}".replace("|", "/")
        roles = ", ".join(f"{count} {role}" for role, count in row.get("roles", {}).items())
        cells = [
            row["model"],
            roles,
            row.get("recipe", ""),
            row.get("swaps", ""),
            row.get("parameters_added", ""),
            error,
        ]
        cells += [row.get(key, "") for key in ("gradients", "features_only", "compile", "seconds")]
        lines += ["| " + " | ".join(str(cell).replace("|", "/") for cell in [*cells, note]) + " |"]
    return "\n".join(lines) + "\n"


def sweep(
    name: str,
    measure: Callable[[str], dict[str, Any]],
    table: Callable[[list[dict[str, Any]]], str],
    description: str,
) -> None:
    """Run what has not been run, and write the table.

    Args:
        name: of the module of `benchmarks` that is run, and of its results.
        measure: gives the row of one model.
        table: writes rows as Markdown.
        description: for the help.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose SPEC contains this")
    parser.add_argument("--limit", type=int, help="at most so many models")
    parser.add_argument("--seconds", type=float, default=240, help="time for one model")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"folder for {name}.jsonl and {name}.md")
    parser.add_argument("--again", action="store_true", help="forget earlier rows")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    from rich.progress import track

    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"{name}.jsonl"
    if options.again:
        file.unlink(missing_ok=True)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    done = {row["model"] for row in rows}
    wanted = [spec for spec in specs() if options.only in spec and spec not in done][: options.limit]
    for spec in track(wanted, "models"):
        row = run(name, spec, options.seconds)
        rows.append(row)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        (options.output / f"{name}.md").write_text(table(rows), encoding="utf-8")
    statuses = dict(Counter(row["status"] for row in rows))
    print(f"{len(rows)} models: {statuses}; see {options.output / name}.md")


if __name__ == "__main__":
    sweep("zoo", measure, table, __doc__ or "")
