"""The three verbs that change a model: apply a plan, convert in one go, restore the plain layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import fx, nn
from torch.optim import Optimizer

from .discovery import Observation, Site, observe
from .discovery.kinds import kind_named, kind_of
from .discovery.record import record
from .discovery.shadow import twin_of
from .errors import PlanError, RewriteError, SurgeryError, UnsupportedModelError, near_misses
from .finetune import forget, remember
from .integrations import network_of
from .operators import BuildError, Operator, Wanted, build_layers, operator_of
from .optimizers import repairs_of
from .plan import Decision, Plan
from .planning import Overrides, plan_and_observation, why_nothing
from .recipe import Recipe
from .rewrite.check_model import refuse_unsupported
from .rewrite.graph import calls_as_modules
from .rewrite.tree import swapped
from .saving.description import Origin, describe
from .surroundings import undisturbed


@undisturbed()
def convert(
    model: nn.Module,
    recipe: str | Path | Recipe = "auto",
    *,
    example_inputs: Any = None,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    operator: str | None = None,
    **settings: Any,
) -> nn.Module:
    """Swap the layers of a model that a recipe names for dynamic ones. The outputs do not change.

    Args:
        model: changed in place; keeps its class, signature, device, dtype, mode, hooks and `requires_grad`. In a
            `torch.fx.GraphModule`, also of `torch.export.export(...).module()`, functional convolutions and linears are
            swapped too, with the names of their weights. A graph does not tell its family: `auto` is then `generic`.
        recipe: `auto` to recognise the family (else `generic`), a shipped recipe's name, a YAML file, or a `Recipe`.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments for one forward; needed
            only where they cannot be told from the model.
        optimizers: one or more that hold the model's parameters, to be given those that come with it in the place of
            those that leave, as `optimizer_after_surgery` does it; changed in place, once all else has succeeded.
        operator: takes the place of the operator of every rule, whose `with` then counts no more, e.g. `odconv`.
        **settings: of the operator; they win over every rule's `with`, e.g. `kernel_num=16`.

    Returns:
        The same object. It remembers the recipe's `finetune` section, for `param_groups`.

    Raises:
        SurgeryError: see `plan` and `apply`; the model is then bit for bit as it was, and so are the optimizers.

    Examples:
        >>> import timm, fdsurgery
        >>> model = fdsurgery.convert(timm.create_model("test_resnet"))
        >>> list(fdsurgery.dynamic_layers(model))[:2]
        ['layer1.0.conv1', 'layer1.0.conv2']
    """
    overrides = Overrides(settings, operator)
    if isinstance(model, fx.GraphModule):
        with calls_as_modules(model) as calls:
            decided, seen = plan_and_observation(model, recipe, example_inputs, overrides)
            stay = [f"{call.node.name}: {call.obstacle}" for call in calls if call.obstacle]
            if stay and not decided.swaps:
                raise PlanError(
                    f"the plan for {decided.model_class} swaps nothing: {why_nothing(decided)}; and {len(stay)} "
                    f"functional call(s) cannot be made modules, {stay[0]}"
                )
            carry_out(decided, seen, model, optimizers)
        return model
    decided, seen = plan_and_observation(model, recipe, example_inputs, overrides)
    carry_out(decided, seen, network_of(model), optimizers)
    return model


@undisturbed()
def apply(plan: Plan, model: nn.Module, *, optimizers: Optimizer | Iterable[Optimizer] = ()) -> nn.Module:
    """Carry out a plan, and check in one more observed forward that every new layer is in use.

    Args:
        plan: made by `plan` for this model, or for another one of the same architecture.
        model: changed in place.
        optimizers: one or more that hold the model's parameters, to be given those that come with it in the place of
            those that leave, as `optimizer_after_surgery` does it; changed in place, once all else has succeeded.

    Returns:
        The same object. It remembers the `finetune` section of the plan's recipe, for `param_groups`.

    Raises:
        PlanError: the plan swaps nothing, or was made for another architecture.
        FineTuningError: an optimizer cannot take the new parameters, or is not of this model; nothing was changed.
        RewriteError: a new layer could not be built or is never called; the model is bit for bit as it was.
        UnsupportedModelError: the model is wrapped, compiled, quantised, scripted or offloaded.

    Examples:
        >>> import timm, fdsurgery
        >>> model = timm.create_model("test_resnet")
        >>> plan = fdsurgery.plan(model).exclude("layer[34].*", "the last stages stay static")
        >>> model = fdsurgery.apply(plan, model)
        >>> list(fdsurgery.dynamic_layers(model))
        ['layer1.0.conv1', 'layer1.0.conv2', 'layer2.0.conv1', 'layer2.0.conv2']
    """
    if (network := network_of(model)) is not model:
        apply(plan, network, optimizers=optimizers)
        return model
    refuse_unsupported(model)
    _refuse_empty(plan)
    layers = dict(model.named_modules(remove_duplicate=False))
    for decision in plan.swaps:
        _check_fits(decision, layers)
    return carry_out(plan, observe(model, plan.example_inputs), model, optimizers)


def carry_out(
    plan: Plan, seen: Observation, model: nn.Module, optimizers: Optimizer | Iterable[Optimizer]
) -> nn.Module:
    """Swap what the plan says in a model that has just been observed, and in the optimizers of its parameters."""
    _refuse_empty(plan)
    now = {name: site for site in seen.sites for name in (site.name, *site.aliases)}
    layers = dict(model.named_modules(remove_duplicate=False))
    for decision in plan.swaps:
        _refuse_offloaded(decision.site.name, layers[decision.site.name])
        if difference := _difference(decision.site, now[decision.site.name]):
            raise PlanError(
                f"the plan no longer fits {decision.site.name!r}: {difference}; make a new plan, or keep the layer: "
                f"plan = plan.exclude({decision.site.name!r}, reason=...)"
            )
    try:
        made = build_layers(
            Wanted(one.site.name, layers[one.site.name], str(one.operator), one.settings) for one in plan.swaps
        )
    except BuildError as error:
        raise RewriteError(f"{error}; nothing was changed") from error.__cause__
    replacements = {layers[name]: layer for name, layer in made.items()}
    before = dict(model.named_parameters())
    with swapped(model, replacements):
        _check_in_use(model, plan, seen)
        repairs = repairs_of(optimizers, model, before)
    remember(model, plan.finetune)
    describe(model, Origin.of(plan, model))
    for repair in repairs:
        repair.carry_out()
    return model


@undisturbed()
def restore(model: nn.Module, names: str | Sequence[str] = "*") -> nn.Module:
    """Put plain layers back in the place of dynamic ones, with the weight they stand for at neutral modulation.

    Straight after a conversion this undoes it; after training, what the modulation learned is lost.

    Args:
        model: changed in place; a model without dynamic layers is left alone.
        names: one or more globs for the names of the layers that become plain again; by default all do. Layers that
            stay compute what they did, also where they share weights with others.

    Returns:
        The same object.

    Raises:
        SurgeryError: `names` means no dynamic layer. Nothing was changed.

    Examples:
        >>> from torch import nn
        >>> import fdsurgery
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> model = fdsurgery.convert(model)
        >>> fdsurgery.restore(model)[2]
        Conv2d(8, 8, kernel_size=(3, 3), stride=(1, 1))
    """
    if (network := network_of(model)) is not model:
        restore(network, names)
        return model
    refuse_unsupported(model)
    dynamic = {name: layer for name, layer in model.named_modules() if operator_of(layer) is not None}
    patterns = [names] if isinstance(names, str) else list(names)
    for pattern in patterns:
        if pattern != "*" and not any(fnmatchcase(name, pattern) for name in dynamic):
            raise SurgeryError(f"no dynamic layer of the model matches {pattern!r}{near_misses(pattern, dynamic)}")
    replacements: dict[nn.Module, nn.Module] = {}
    made: dict[nn.Module, set[str]] = {}
    leaving: dict[Operator, list[nn.Module]] = {}
    for name, layer in dynamic.items():
        operator = operator_of(layer)
        if operator is not None and any(fnmatchcase(name, pattern) for pattern in patterns):
            plain = replacements[layer] = operator.restore(layer)
            # What a dynamic layer consists of is what one made for the plain layer would.
            (again,) = operator.build([name], [twin_of(plain, meta=True)[0]], [operator.settings_of(layer)])
            made[layer] = {*vars(again), *again._parameters, *again._buffers, *again._modules}
            leaving.setdefault(operator, []).append(layer)
    with swapped(model, replacements, made):
        for operator, gone in leaving.items():
            operator.release(gone, [layer for layer in dynamic.values() if layer not in replacements])
    if len(replacements) == len(dynamic):
        forget(model)
    describe(model)
    return model


def _check_fits(decision: Decision, layers: dict[str, nn.Module]) -> None:
    site = decision.site
    layer = layers.get(site.name)
    if layer is None:
        raise PlanError(
            f"the plan was made for another model: this one has no {site.name!r}{near_misses(site.name, layers)}"
        )
    kind = kind_named(site.kind)
    if kind_of(layer) is not kind or operator_of(layer) is not None:
        raise PlanError(
            f"the plan was made for another model: {site.name!r} is a {type(layer).__name__} here, "
            f"not a plain {kind.plain.__name__}"
        )
    in_channels, out_channels = kind.channels(layer)
    if (in_channels, out_channels) != (site.in_channels, site.out_channels):
        raise PlanError(
            f"the plan was made for another model: {site.name!r} maps {in_channels} to {out_channels} channels here, "
            f"{site.in_channels} to {site.out_channels} in the plan"
        )
    _refuse_offloaded(site.name, layer)


def _refuse_offloaded(name: str, layer: nn.Module) -> None:
    hook = getattr(layer, "_hf_hook", None)
    if hook is not None and getattr(hook, "offload", False):
        raise UnsupportedModelError(
            f"the weights of {name!r} are offloaded by accelerate; load the model without offloading, convert it, "
            "and dispatch it afterwards"
        )


def _refuse_empty(plan: Plan) -> None:
    if not plan.swaps:
        raise PlanError(f"the plan for {plan.model_class} swaps nothing: {why_nothing(plan)}")


def _difference(planned: Site, now: Site) -> str | None:
    """The first thing in which a layer is not what it was when the plan was made, in words."""
    if now.obstacle is not None:
        return now.obstacle
    if now.caution is not None and planned.caution is None:
        return now.caution
    names = ["kernel_size", "stride", "dilation", "groups", "padding", "padding_mode", "pads_same"]
    if now.layer_class != kind_named(now.kind).plain.__name__:  # in a graph, functional calls have become plain layers
        names.append("layer_class")
    for name in names:
        if getattr(planned, name) != getattr(now, name):
            return f"{name} was {getattr(planned, name)} in the plan and is {getattr(now, name)} here"
    return None


def _check_in_use(model: nn.Module, plan: Plan, seen: Observation) -> None:
    """One more recorded forward: with the inputs that the model ran with before, every new layer is called."""
    swapped_names = [decision.site.name for decision in plan.swaps]
    try:
        graph = record(model, seen.inputs, meta=seen.tracer != "real", hooks=seen.hooks)
    except Exception as error:
        where = getattr(error, "failed_in", "")
        inside = [name for name in swapped_names if name == where] or [
            name for name in swapped_names if name.startswith(f"{where}." if where else "")
        ]
        said = " ".join(str(error).split())[:300]
        raise RewriteError(
            f"after the swap the model's forward fails in {where or type(model).__name__!r}; before, it ran with the "
            f"same inputs. It said: {type(error).__name__}: {said}. Keep what is used there in a way of its own: "
            f"plan = plan.exclude({(inside or swapped_names)[0]!r}, reason=...). The model was put back as it was"
        ) from error
    called = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for name in swapped_names:
        before = next(site.calls for site in seen.sites if name in (site.name, *site.aliases))
        if called[name] < before:
            raise RewriteError(
                f"after the swap {name!r} is {f'called {called[name]} times' if called[name] else 'never called'}, and "
                f"was {before} times before: the model holds it in a place that cannot be reached as well; keep it: "
                f"plan = plan.exclude({name!r}, reason=...). The model was put back as it was"
            )
