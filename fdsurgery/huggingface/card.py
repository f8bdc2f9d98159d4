"""The README of a saved model: what it is, and how to load it."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..operators import get_operator, operator_of
from ..planning import Plan
from ..report import in_units
from .description import Description, LayerGroup


def model_card(model: nn.Module, plan: Plan | None) -> str:
    """A model card in Markdown.

    Args:
        model: a converted transformers model whose config describes it.
        plan: the plan that was carried out, where it is known.
    """
    config: Any = model.config
    description = Description.from_dict(config.quantization_config)
    total = sum(parameter.numel() for parameter in model.parameters())
    added = sum(_parameters_added(layer) for layer in model.modules() if operator_of(layer) is not None)
    origin = description.origin
    facts = [
        f"- class: `{description.model_class}` of transformers (`{config.model_type}`)",
        *([f"- recipe: `{origin.recipe}`"] if origin.recipe else []),
        *([f"- plan: {plan.summary()}"] if plan is not None else []),
        f"- dynamic layers: {sum(len(group.shapes) for group in description.layers)}",
        f"- parameters: {total:,}, of which {added:,} were added by the dynamic layers",
    ]
    if origin.multiply_adds and origin.multiply_adds_added:
        facts.append(
            f"- multiply-adds for one sample: {in_units(origin.multiply_adds + origin.multiply_adds_added)}, of which "
            f"{in_units(origin.multiply_adds_added)} were added by the dynamic layers"
        )
    groups = [
        f"| {group.operator} | {len(group.shapes)} | `{next(iter(group.shapes))}` | {_unusual_settings(group)} |"
        for group in description.layers
    ]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [fdsurgery, fdconv, dynamic-convolution]",
            "---",
            "",
            f"# {description.model_class} with dynamic layers",
            "",
            "Some layers of this model are [Frequency Dynamic Convolutions](https://arxiv.org/abs/2503.18783), put in "
            "by `fdsurgery`. **transformers alone cannot load it**: import `fdsurgery` first.",
            "",
            "```bash",
            'pip install "fdsurgery[hf]"',
            "```",
            "",
            "```python",
            "import fdsurgery",
            "",
            'model = fdsurgery.from_pretrained("FOLDER_OR_REPOSITORY")',
            "```",
            "",
            "Once `fdsurgery` is imported, the `from_pretrained` of transformers' own classes loads it too.",
            "",
            *facts,
            "",
            "| operator | layers | the first | settings |",
            "|---|---|---|---|",
            *groups,
            "",
            "Which layers these are is told by `quantization_config` in `config.json`; nothing is quantised.",
            "",
        ]
    )


def _unusual_settings(group: LayerGroup) -> str:
    usual = get_operator(group.operator).settings({})
    return ", ".join(f"{key}={value}" for key, value in group.settings.items() if value != usual[key]) or "the defaults"


def _parameters_added(layer: nn.Module) -> int:
    """Beyond those of the plain layer it stands for."""
    weight, bias = layer.weight, layer.bias
    plain = weight.numel() + (0 if bias is None else bias.numel())  # type: ignore[union-attr, operator]
    return sum(parameter.numel() for parameter in layer.parameters()) - int(plain)
