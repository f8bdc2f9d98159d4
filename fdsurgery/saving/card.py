"""The README of a saved model: what it is, and how to load it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..operators import get_operator, made_layers
from ..plan import Plan
from ..report import in_units
from .description import Description, LayerGroup

if TYPE_CHECKING:
    from ..verification import Verification

MARK = "<!-- fdsurgery writes this card anew with each save; to keep yours, remove this line -->"


def is_own_card(content: bytes) -> bool:
    """True for a card that `model_card` made, and whose mark was left in it."""
    return MARK.encode() in content


def model_card(model: nn.Module, plan: Plan | None, verification: Verification | None = None) -> str:
    """A model card in Markdown.

    Args:
        model: a converted transformers model whose config describes it.
        plan: the plan that was carried out, where it is known.
        verification: what `verify` measured after the conversion, where it is known.
    """
    config: Any = model.config
    description = Description.from_dict(config.quantization_config)
    total = sum(parameter.numel() for parameter in model.parameters())
    added = sum(_parameters_added(one.layer) for one in made_layers(model).values())
    origin = description.origin
    of_transformers = type(model).__module__.startswith("transformers.")
    library = "transformers" if of_transformers else f"`{type(model).__module__}`"
    facts = [
        f"- class: `{description.model_class}` of {library} (`{config.model_type}`)",
        *([f"- recipe: `{origin.recipe}`"] if origin.recipe else []),
        *([f"- plan: {plan.summary()}"] if plan is not None else []),
        f"- dynamic layers: {sum(len(group.shapes) for group in description.layers)}",
        f"- parameters: {total:,}, of which {added:,} were added by the dynamic layers",
    ]
    if origin.multiply_adds and origin.multiply_adds_added:
        facts.append(
            f"- multiply-adds for one sample: {in_units(origin.multiply_adds + origin.multiply_adds_added)}, of which "
            f"{in_units(origin.multiply_adds_added)} were added by the dynamic layers (inputs of the size that the "
            "conversion was planned with)"
        )
    if verification is not None:
        facts.append(f"- checked after the conversion: {verification}")
    groups = [
        f"| {group.operator} | {len(group.shapes)} | `{next(iter(group.shapes))}` | {_unusual_settings(group)} |"
        for group in description.layers
    ]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            f"tags: [{', '.join(('fdsurgery', *_operators(description), 'dynamic-convolution'))}]",
            "---",
            "",
            MARK,
            "",
            f"# {description.model_class} with dynamic layers",
            "",
            f"Some layers of this model are {_kinds(description)}, put in by `fdsurgery`. **transformers alone cannot "
            "load it**: import `fdsurgery` first.",
            "",
            "```bash",
            'pip install "fdsurgery[hf]"',
            "```",
            "",
            *_loading(model, of_transformers),
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


def _operators(description: Description) -> list[str]:
    return sorted({group.operator for group in description.layers})


def _kinds(description: Description) -> str:
    names = _operators(description)
    return " and ".join(get_operator(name).title or f"dynamic layers of the operator `{name}`" for name in names)


def _loading(model: nn.Module, of_transformers: bool) -> list[str]:
    """How to load it: a class of the user's own is not found by name."""
    if of_transformers:
        code = ['model = fdsurgery.from_pretrained("FOLDER_OR_REPOSITORY")']
        more = ["", "Once `fdsurgery` is imported, the `from_pretrained` of transformers' own classes loads it too."]
    else:
        name = type(model).__name__
        code = [
            f"from {type(model).__module__} import {name}",
            "",
            f'model = {name}.from_pretrained("FOLDER_OR_REPOSITORY")',
        ]
        more = []
    return ["```python", "import fdsurgery", *([""] if of_transformers else []), *code, "```", *more]


def _unusual_settings(group: LayerGroup) -> str:
    usual = get_operator(group.operator).settings({})
    return ", ".join(f"{key}={value}" for key, value in group.settings.items() if value != usual[key]) or "the defaults"


def _parameters_added(layer: nn.Module) -> int:
    """Beyond those of the plain layer it stands for."""
    weight, bias = layer.weight, layer.bias
    plain = weight.numel() + (0 if bias is None else bias.numel())  # type: ignore[union-attr, operator]
    return sum(parameter.numel() for parameter in layer.parameters()) - int(plain)
