"""What a recipe file may say."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from fdconv import FDConfig

from ..errors import RecipeError, near_misses
from ..operators import OPERATORS, get_operator
from .conditions import Patterns, Where
from .rules import Delegate, Figures, FineTune, KeepRule, Match, SwapRule
from .yaml_source import KeyPath, YamlSource


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


_NAME = {"type": "string", "minLength": 1}
Texts = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(_one_or_more),
    WithJsonSchema({"anyOf": [_NAME, {"type": "array", "items": _NAME}]}),
]


class _Closed(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, populate_by_name=True, use_attribute_docstrings=True
    )


class MatchEntry(_Closed):
    """How models of the family are recognised."""

    timm: Patterns = ()
    """Globs for timm architectures, e.g. `convnext*`."""
    transformers: Patterns = ()
    """Globs for `config.model_type`, e.g. `convnextv2`."""
    torchvision: Patterns = ()
    """Globs for model classes, e.g. `ConvNeXt`."""


class KeepEntry(Where):
    """An entry of `keep`: conditions and the reason."""

    because: Annotated[str, Field(min_length=1)]
    """The reason, shown in the plan."""
    optional: bool = False
    """The rule may match no layer."""


class SwapEntry(_Closed):
    """An entry of `swap`."""

    where: Where
    """Which layers."""
    operator: str = "fdconv"
    """What takes their place."""
    with_: dict[str, Any] = Field(default_factory=dict, alias="with")
    """Settings of the operator; the rest are its defaults."""
    anyway: bool = False
    """Swap also where that changes what the model means, such as in a causal decoder; see "What is kept, and why"."""
    optional: bool = False
    """The rule may match no layer."""


class FineTuneEntry(_Closed):
    """How to train what the recipe converts."""

    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor of the learning rate from each layer to the one before it; 1 where no recipe says."""


GONE = {
    ("finetune", "spectrum_lr_scale"): "this key is gone and needs no successor: a spectrum is stored so that it moves "
    "its weight as far as the weight itself would move; delete the line",
    ("finetune", "modulation_lr_scale"): "this key is gone and has no successor: no measurement has shown a use for "
    "another rate than that of all parameters; delete the line",
}
"""Keys of version 0.1, and why nothing takes their place."""


class FiguresEntry(_Closed):
    """What the recipe does to one model."""

    model: str
    """The model's SPEC, e.g. `timm:resnet50`."""
    swaps: int
    """Layers swapped."""
    parameters_added: int
    """Parameters gained."""
    multiply_adds: int
    """Of the swapped layers while they were plain, for one image of the model's native size."""


class RecipeFile(_Closed):
    """A whole file."""

    description: str = ""
    """What the recipe does, in a sentence."""
    source: str = ""
    """Where its policy comes from."""
    extends: Texts = ()
    """Recipes whose rules follow after this one's: names of shipped ones, or files beside this one."""
    match: MatchEntry = MatchEntry()
    """How models of the family are recognised."""
    keep: tuple[KeepEntry, ...] = Field(default=(), strict=False)
    """Layers that stay as they are, whatever `swap` says."""
    swap: tuple[SwapEntry, ...] = Field(default=(), strict=False)
    """Layers to swap; the first entry that matches decides."""
    delegate: dict[str, str] = Field(default_factory=dict)
    """Parts of a composite model (globs for module names) and the recipe of each: `auto`, a name or a file."""
    finetune: FineTuneEntry = FineTuneEntry()
    """How to train what the recipe converts."""
    figures: tuple[FiguresEntry, ...] = Field(default=(), strict=False)
    """What the recipe does to some models, for readers and tests."""

    def match_rules(self) -> Match:
        """The globs by which the family is recognised."""
        return Match(self.match.timm, self.match.transformers, self.match.torchvision)

    def all_figures(self) -> tuple[Figures, ...]:
        """The entries of `figures`."""
        return tuple(Figures(**dict(entry)) for entry in self.figures)

    def fine_tuning(self) -> FineTune:
        """What `finetune` says."""
        return FineTune(**dict(self.finetune))

    def keep_rules(self, source: YamlSource) -> tuple[KeepRule, ...]:
        """The entries of `keep`, each with its place in the file."""
        rules = []
        for index, entry in enumerate(self.keep):
            where = Where.model_construct(**entry.given())
            rules.append(KeepRule(where, *_place(source, "keep", index), entry.optional, entry.because))
        return tuple(rules)

    def swap_rules(self, source: YamlSource) -> tuple[SwapRule, ...]:
        """The entries of `swap`, each with its place in the file."""
        return tuple(
            SwapRule(
                entry.where, *_place(source, "swap", index), entry.optional, entry.operator, entry.with_, entry.anyway
            )
            for index, entry in enumerate(self.swap)
        )

    def delegates(self, source: YamlSource) -> tuple[Delegate, ...]:
        """The entries of `delegate`, each with its place in the file."""
        return tuple(
            Delegate(module, recipe, source.place_of(("delegate", module))) for module, recipe in self.delegate.items()
        )


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, by which editors complete and check one."""
    schema = RecipeFile.model_json_schema()
    settings = {field.name: {"description": f"fdconv: default {field.default!r}"} for field in fields(FDConfig)}
    for operator in OPERATORS.values():
        for key, default in operator.settings({}).items():
            settings.setdefault(key, {"description": f"{operator.name}: default {default!r}"})
    schema["$defs"]["SwapEntry"]["properties"]["with"]["properties"] = settings
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "fdsurgery recipe"}


def read_file(source: YamlSource) -> RecipeFile:
    """Check a document against the schema.

    Raises:
        RecipeError: the first fault, as `file:line:column: keys: what was wrong; what would be right`.
    """
    if not isinstance(source.data, dict):
        raise source.error(
            (), f"a recipe is a mapping of {', '.join(RecipeFile.model_fields)}, not {_kind(source.data)}"
        )
    try:
        file = RecipeFile.model_validate(source.data)
    except ValidationError as error:
        faults = sorted((_fault(fault, source) for fault in error.errors()), key=lambda fault: fault[0])
        raise faults[0][1] from None
    for index, keep in enumerate(file.keep):
        if not keep.given():
            raise source.error(("keep", index), f"says which sites by none of {', '.join(Where.model_fields)}")
    for index, swap in enumerate(file.swap):
        if not swap.where.given():
            raise source.error(("swap", index, "where"), f"says which sites by none of {', '.join(Where.model_fields)}")
        try:
            get_operator(swap.operator)
        except RecipeError as error:
            raise source.error(("swap", index, "operator"), str(error)) from None
        _check_settings(source, ("swap", index, "with"), swap)
    return file


def _check_settings(source: YamlSource, path: KeyPath, swap: SwapEntry) -> None:
    operator = get_operator(swap.operator)
    for key, value in swap.with_.items():  # one by one, to tell which of them is wrong
        try:
            operator.settings({key: value})
        except RecipeError as error:
            raise source.error((*path, key), str(error)) from None
    try:
        operator.settings(swap.with_)
    except RecipeError as error:
        raise source.error(path, str(error)) from None


def _place(source: YamlSource, section: str, index: int) -> tuple[str, int, int, str]:
    line, column = source.places[(section, index)]
    return source.file, line, column, f"{section}[{index}]"


def _fault(fault: Any, source: YamlSource) -> tuple[tuple[int, int], RecipeError]:
    """One of pydantic's errors in our words, with the place to sort by."""
    path: KeyPath = fault["loc"]
    kind, given = fault["type"], fault["input"]
    if path in GONE:
        message = GONE[path]
    elif kind == "extra_forbidden":
        known = _keys_at(path[:-1])
        message = f"no such key; known: {', '.join(known)}{near_misses(str(path[-1]), known)}"
    elif kind == "missing":
        message = f"{path[-1]!r} is missing" + (": say why these sites are kept" if path[-1] == "because" else "")
        path = path[:-1]
    elif kind == "value_error":
        message = str(fault["ctx"]["error"])
    elif kind == "string_type" and isinstance(given, (bool, int, float)):
        message = f"expected text, not {given!r}; put it in quotes if it is meant as text"
    else:
        message = f"{fault['msg'][:1].lower()}{fault['msg'][1:]}, not {_kind(given)}"
    place = next(source.places[path[:end]] for end in range(len(path), -1, -1) if path[:end] in source.places)
    return place, source.error(path, message)


def _keys_at(path: KeyPath) -> list[str]:
    models: dict[KeyPath, type[BaseModel]] = {(): RecipeFile, ("match",): MatchEntry, ("keep",): KeepEntry}
    models |= {("swap",): SwapEntry, ("swap", "where"): Where}
    models |= {("finetune",): FineTuneEntry, ("figures",): FiguresEntry}
    model = models[tuple(step for step in path if isinstance(step, str))]
    return [field.alias or name for name, field in model.model_fields.items()]


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    return repr(value)
