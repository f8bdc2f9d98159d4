"""What a recipe file may say."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WithJsonSchema

from ..errors import RecipeError, no_such_key
from ..operators import get_operator, operators
from .conditions import Where
from .rules import Delegate, Entry, Figures, FineTune, KeepRule, Match, Place, SwapRule
from .yaml_source import KeyPath, YamlSource


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


_NAME = {"type": "string", "minLength": 1}
Texts = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(_one_or_more),
    WithJsonSchema({"anyOf": [_NAME, {"type": "array", "items": _NAME}]}),
]


GONE = {
    ("finetune", "spectrum_lr_scale"): "this key is gone and needs no successor: a spectrum is stored so that it moves "
    "its weight as far as the weight itself would move; delete the line",
    ("finetune", "modulation_lr_scale"): "this key is gone and has no successor: no measurement has shown a use for "
    "another rate than that of all parameters; delete the line",
}
"""Keys of version 0.1, and why nothing takes their place."""


class RecipeFile(Entry):
    """A whole file."""

    description: str = ""
    """What the recipe does, in a sentence."""
    source: str = ""
    """Where its policy comes from."""
    extends: Texts = ()
    """Recipes whose rules follow after this one's: names of shipped ones, or files beside this one."""
    match: Match = Match()
    """How models of the family are recognised."""
    keep: tuple[KeepRule, ...] = Field(default=(), strict=False)
    """Layers that stay as they are, whatever `swap` says."""
    swap: tuple[SwapRule, ...] = Field(default=(), strict=False)
    """Layers to swap; the first entry that matches decides."""
    delegate: dict[str, str] = Field(default_factory=dict)
    """Parts of a composite model (globs for module names) and the recipe of each: `auto`, a name or a file."""
    finetune: FineTune = FineTune()
    """How to train what the recipe converts."""
    figures: tuple[Figures, ...] = Field(default=(), strict=False)
    """What the recipe does to some models, for readers and tests."""

    def keep_rules(self, source: YamlSource) -> tuple[KeepRule, ...]:
        """The entries of `keep`, each with its place in the file."""
        return tuple(rule.at(_place(source, "keep", index)) for index, rule in enumerate(self.keep))

    def swap_rules(self, source: YamlSource) -> tuple[SwapRule, ...]:
        """The entries of `swap`, each with its place in the file."""
        return tuple(rule.at(_place(source, "swap", index)) for index, rule in enumerate(self.swap))

    def delegates(self, source: YamlSource) -> tuple[Delegate, ...]:
        """The entries of `delegate`, each with its place in the file."""
        return tuple(
            Delegate(module, recipe, source.place_of(("delegate", module))) for module, recipe in self.delegate.items()
        )


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, by which editors complete and check one."""
    schema = RecipeFile.model_json_schema()
    schema["$defs"]["SwapRule"]["properties"]["with"]["properties"] = _settings_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "fdsurgery recipe"}


def _settings_schema() -> dict[str, dict[str, Any]]:
    """The settings of all operators. Of one that several have, which need not agree, only what it is to each."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, operator in operators().items():
        for key, schema in operator.settings_schema().items():
            found.setdefault(key, {})[name] = schema
    merged = {}
    for key, by_operator in found.items():
        told = "; ".join(dict.fromkeys(f"{name}: {one.get('description', '')}" for name, one in by_operator.items()))
        (first, *others) = by_operator.values()
        merged[key] = {**({} if others else first), "description": told}
    return merged


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


def _check_settings(source: YamlSource, path: KeyPath, swap: SwapRule) -> None:
    operator = get_operator(swap.operator)
    for key, value in swap.settings.items():  # one by one, to tell which of them is wrong
        try:
            operator.settings({key: value})
        except RecipeError as error:
            raise source.error((*path, key), str(error)) from None
    try:
        operator.settings(swap.settings)
    except RecipeError as error:
        raise source.error(path, str(error)) from None


def _place(source: YamlSource, section: str, index: int) -> Place:
    line, column = source.places[(section, index)]
    return Place(source.file, line, column, f"{section}[{index}]")


def _fault(fault: Any, source: YamlSource) -> tuple[tuple[int, int], RecipeError]:
    """One of pydantic's errors in our words, with the place to sort by."""
    path: KeyPath = fault["loc"]
    kind, given = fault["type"], fault["input"]
    if path in GONE:
        message = GONE[path]
    elif kind == "extra_forbidden":
        known = _keys_at(path[:-1])
        message = no_such_key(str(path[-1]), known)
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
    models: dict[KeyPath, type[BaseModel]] = {(): RecipeFile, ("keep",): KeepRule}
    models |= {("swap",): SwapRule, ("swap", "where"): Where}
    models |= {("finetune",): FineTune, ("figures",): Figures}
    model = models[tuple(step for step in path if isinstance(step, str))]
    return [field.alias or name for name, field in model.model_fields.items()]


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    return repr(value)
