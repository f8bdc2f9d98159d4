"""The three verbs that change a model: apply a plan, convert in one go, restore the plain layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import fx, nn

from .discovery import observe
from .errors import PlanError, RewriteError, UnsupportedModelError, near_misses
from .huggingface.description import Origin, describe
from .integrations.ultralytics import network_of
from .operators import get_operator, operator_of
from .planning import Decision, Plan, plan, why_nothing
from .recipe import Recipe
from .rewrite.supported import refuse_unsupported
from .rewrite.tree import swapped


def convert(
    model: nn.Module,
    recipe: str | Path | Recipe = "auto",
    *,
    example_inputs: Any = None,
    **overrides: Any,
) -> nn.Module:
    """Swap the layers of a model that a recipe names for dynamic ones. The outputs do not change.

    ```python
    model = fdsurgery.convert(timm.create_model("convnext_tiny", pretrained=True))
    ```

    Args:
        model: changed in place; keeps its class, signature, device, dtype, mode, hooks and `requires_grad`. In a
            `torch.fx.GraphModule`, functional convolutions and linears are swapped too: see `fdsurgery.rewrite.graph`.
        recipe: `auto` to recognise the family (else `generic`), a shipped recipe's name, a YAML file, or a `Recipe`.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments for one forward; needed
            only where they cannot be told from the model.
        **overrides: operator settings that win over every rule's `with`, e.g. `kernel_num=16`.

    Returns:
        The same object.

    Raises:
        SurgeryError: see `plan` and `apply`; the model is then bit for bit as it was.
    """
    if isinstance(model, fx.GraphModule):
        from .rewrite import graph  # which builds on this module

        return graph.convert(model, recipe, example_inputs=example_inputs, **overrides)
    return apply(plan(model, recipe, example_inputs=example_inputs, **overrides), model)


def apply(plan: Plan, model: nn.Module) -> nn.Module:
    """Carry out a plan, and check in one more observed forward that every new layer is in use.

    Args:
        plan: made by `plan` for this model, or for another one of the same architecture.
        model: changed in place.

    Returns:
        The same object.

    Raises:
        PlanError: the plan swaps nothing, or was made for another architecture.
        RewriteError: a new layer could not be built or is never called; the model is bit for bit as it was.
        UnsupportedModelError: the model is wrapped, compiled, quantised, scripted or offloaded.
    """
    if (network := network_of(model)) is not model:
        apply(plan, network)
        return model
    refuse_unsupported(model)
    if not plan.swaps:
        raise PlanError(f"the plan for {plan.model_class} swaps nothing: {why_nothing(plan)}")
    layers = dict(model.named_modules(remove_duplicate=False))
    for decision in plan.swaps:
        _check_fits(decision, layers)
    replacements: dict[nn.Module, nn.Module] = {}
    for decision in plan.swaps:
        assert decision.operator is not None
        old = layers[decision.site.name]
        try:
            replacements[old] = get_operator(decision.operator).replace(old, decision.settings)
        except Exception as error:
            raise RewriteError(f"{decision.site.name}: {type(error).__name__}: {error}; nothing was changed") from error
    with swapped(model, replacements):
        _check_in_use(model, plan)
    describe(model, Origin.of(plan))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Put a plain layer back in the place of every dynamic one, with the weight it stands for at neutral modulation.

    Straight after a conversion this undoes it; after training, what the modulation learned is lost.

    Args:
        model: changed in place; a model without dynamic layers is left alone.

    Returns:
        The same object.
    """
    if (network := network_of(model)) is not model:
        restore(network)
        return model
    refuse_unsupported(model)
    replacements: dict[nn.Module, nn.Module] = {}
    for layer in model.modules():
        operator = operator_of(layer)
        if operator is not None:
            replacements[layer] = operator.restore(layer)
    with swapped(model, replacements):
        pass
    describe(model)
    return model


def _check_fits(decision: Decision, layers: dict[str, nn.Module]) -> None:
    site = decision.site
    layer = layers.get(site.name)
    if layer is None:
        raise PlanError(
            f"the plan was made for another model: this one has no {site.name!r}{near_misses(site.name, layers)}"
        )
    kind: type[nn.Module] = nn.Conv2d if site.kind == "conv" else nn.Linear
    if not isinstance(layer, kind) or operator_of(layer) is not None:
        raise PlanError(
            f"the plan was made for another model: {site.name!r} is a {type(layer).__name__} here, "
            f"not a plain {kind.__name__}"
        )
    names = ("out_channels", "in_channels") if site.kind == "conv" else ("out_features", "in_features")
    shape = tuple(getattr(layer, name) for name in names)
    if shape != (site.out_channels, site.in_channels):
        raise PlanError(
            f"the plan was made for another model: {site.name!r} maps {shape[1]} to {shape[0]} channels here, "
            f"{site.in_channels} to {site.out_channels} in the plan"
        )
    hook = getattr(layer, "_hf_hook", None)
    if hook is not None and getattr(hook, "offload", False):
        raise UnsupportedModelError(
            f"the weights of {site.name!r} are offloaded by accelerate; load the model without offloading, convert it, "
            "and dispatch it afterwards"
        )


def _check_in_use(model: nn.Module, plan: Plan) -> None:
    calls = {site.name: site.calls for site in observe(model, plan.example_inputs).sites}
    idle = [decision.site.name for decision in plan.swaps if not calls.get(decision.site.name)]
    if idle:
        raise RewriteError(
            f"after the swap {len(idle)} new layer(s) are never called, {idle[0]!r} first: the model holds them in a "
            "place that cannot be reached; keep them by a rule. The model was put back as it was"
        )
