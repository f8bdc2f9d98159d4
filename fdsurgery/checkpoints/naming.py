"""What the same tensor is called elsewhere: in saved transformers checkpoints, in mmdet, mmseg and mmpretrain, and so
in the authors' code, which builds on those.

A naming is a table from a model's own names, so it is exact for that model, and reads and writes alike.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..integrations import library_of
from ..operators import operators


@dataclass(frozen=True)
class Foreign:
    """A tensor's name elsewhere, and which part of that one it is."""

    name: str
    part: int = 0
    parts: int = 1
    """Above 1 where the other side keeps several tensors as one, one after another along the first axis."""
    tail: tuple[int, ...] = ()
    """Axes of one that the other side has at the end: a 1x1 convolution for a linear layer."""


@dataclass(frozen=True)
class Naming:
    """How one code base names the tensors of a model."""

    label: str
    table: Mapping[str, Foreign]
    official: bool = False
    """True for names that the authors' code understands."""
    root: str = ""
    """Prefix of the part that is this model; what lies outside of it belongs to others."""

    def layer(self, fqn: str) -> str | None:
        """What a layer is called, by its weight; None where that is unnamed or a part of another tensor."""
        foreign = self.table.get(f"{fqn}.weight")
        if foreign is None or foreign.parts > 1:
            return None
        return foreign.name.removesuffix(".weight")


@dataclass(frozen=True)
class Recognised:
    """The naming that a checkpoint follows."""

    naming: Naming
    prefix: str
    """What stands before every name, such as `module.`."""

    def claims(self, name: str) -> bool:
        """True for names that lie where this model's tensors do."""
        return name.startswith(self.prefix + self.naming.root)

    def name(self, foreign: Foreign) -> str:
        """The name in the checkpoint."""
        return self.prefix + foreign.name

    def layer(self, fqn: str) -> str | None:
        """See `Naming.layer`."""
        inner = self.naming.layer(fqn)
        return None if inner is None else self.prefix + inner


def namings(model: nn.Module, names: Collection[str]) -> tuple[Naming, ...]:
    """All namings known for a model with these tensors: official ones first, then what its library saves, then its own.

    Args:
        model: asked for its library only; may be on meta.
        names: those of its state dict, before any layer is swapped.
    """
    library = library_of(model)
    saved = {name: name for name in names} if library is None else library.saved_names(model, names)
    found = []
    for family in _FAMILIES:
        body = {name: foreign for name in names if (foreign := family.foreign(saved[name])) is not None}
        if 2 * len(body) <= len(names) or not any(re.match(family.has, saved[name]) for name in names):
            continue
        bare = {name: body.get(name, Foreign(saved[name])) for name in names}
        found.append(Naming(family.label, bare, official=True))
        full = {name: _under("backbone.", foreign) for name, foreign in body.items()}
        full |= {name: foreign for name in names if (foreign := family.foreign_head(saved[name])) is not None}
        found.append(Naming(family.label, full, official=True, root="backbone."))
    if library is not None and any(name != other for name, other in saved.items()):
        found.append(Naming(f"saved names of {library.name}", {name: Foreign(saved[name]) for name in names}))
    found.append(Naming("the model's own names", {name: Foreign(name) for name in names}))
    return tuple(found)


def recognise(known: Iterable[Naming], present: Collection[str]) -> Recognised | None:
    """The naming, and the prefix, under which a checkpoint has most of a model's tensors; None if it has none."""
    best, most = None, 0
    for naming in known:
        wanted = [foreign.name for foreign in naming.table.values()]
        for prefix in _prefixes(wanted, present):
            hits = sum(_has(prefix + name, present) for name in wanted)
            if hits > most:
                best, most = Recognised(naming, prefix), hits
    return best


def _has(name: str, present: Collection[str]) -> bool:
    return name in present or any(other in present for other in _dynamic(name))


def _dynamic(name: str) -> list[str]:
    """What a plain layer's weight may be called where the layer is dynamic."""
    leaves = [operator.leaf for operator in operators().values() if operator.leaf is not None]
    return [name.removesuffix("weight") + leaf for leaf in leaves] if name.endswith(".weight") else []


def _prefixes(wanted: list[str], present: Collection[str]) -> list[str]:
    """What stands in a checkpoint before some of the wanted names, shortest first."""
    weights = [name for name in wanted if name.endswith(".weight")]
    samples = {name for at in (0, len(weights) // 2, -1) for name in weights[at:][:1]}
    samples |= {other for name in samples for other in _dynamic(name)}
    found = {
        name.removesuffix(sample)
        for name in present
        for sample in samples
        if name == sample or name.endswith("." + sample)
    }
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def _under(root: str, foreign: Foreign) -> Foreign:
    return Foreign(root + foreign.name, foreign.part, foreign.parts, foreign.tail)


@dataclass(frozen=True)
class _Rule:
    """A pattern over a model's saved names, and the name elsewhere; `{x1}` is the number of the group `x`, plus one."""

    own: str
    elsewhere: str
    part: int = 0
    parts: int = 1
    tail: tuple[int, ...] = ()

    def foreign(self, name: str) -> Foreign | None:
        match = re.fullmatch(self.own, name)
        if match is None:
            return None
        groups = match.groupdict()
        raised = {f"{key}1": int(value) + 1 for key, value in groups.items() if value.isdecimal()}
        return Foreign(self.elsewhere.format(**groups, **raised), self.part, self.parts, self.tail)


@dataclass(frozen=True)
class _Family:
    label: str
    rules: tuple[_Rule, ...]
    heads: tuple[_Rule, ...] = ()
    has: str = ""
    """A name that the models of this family have."""

    def foreign(self, name: str) -> Foreign | None:
        return next((foreign for rule in self.rules if (foreign := rule.foreign(name)) is not None), None)

    def foreign_head(self, name: str) -> Foreign | None:
        return next((foreign for rule in self.heads if (foreign := rule.foreign(name)) is not None), None)


_LEAF = r"\.(?P<leaf>.+)"
_BLOCK = r"blocks\.(?P<i>\d+)\."
_HF_STAGE = r"(?:resnet\.)?encoder\.stages\.(?P<s>\d+)\.layers\.(?P<b>\d+)\."
_HF_VIT = r"(?:\w+\.)?encoder\.layer\.(?P<i>\d+)\."
_HF_MIT_STAGE = r"(?:segformer\.)?encoder\."
_HF_MIT = rf"{_HF_MIT_STAGE}block\.(?P<s>\d+)\.(?P<b>\d+)\."
_MM_MIT = "layers.{s}.1.{b}."
_QKV = ("query", "key", "value")

_FAMILIES = (
    _Family(
        "mmdet's ResNet names",
        (_Rule(r"(?P<all>(?:conv1|bn1|layer\d+)\..+)", "{all}"),),
        (_Rule(rf"fc{_LEAF}", "head.fc.{leaf}"),),
        has=r"conv1\.weight",
    ),
    _Family(
        "mmdet's ResNet names",
        (
            _Rule(rf"conv1\.(?P<i>\d+){_LEAF}", "stem.{i}.{leaf}"),
            _Rule(rf"bn1{_LEAF}", "stem.7.{leaf}"),
            _Rule(r"(?P<all>layer\d+\..+)", "{all}"),
        ),
        (_Rule(rf"fc{_LEAF}", "head.fc.{leaf}"),),
        has=r"conv1\.6\.weight",
    ),
    _Family(
        "mmdet's ResNet names",
        (
            _Rule(rf"(?:resnet\.)?embedder\.embedder\.convolution{_LEAF}", "conv1.{leaf}"),
            _Rule(rf"(?:resnet\.)?embedder\.embedder\.normalization{_LEAF}", "bn1.{leaf}"),
            _Rule(rf"{_HF_STAGE}layer\.(?P<k>\d+)\.convolution{_LEAF}", "layer{s1}.{b}.conv{k1}.{leaf}"),
            _Rule(rf"{_HF_STAGE}layer\.(?P<k>\d+)\.normalization{_LEAF}", "layer{s1}.{b}.bn{k1}.{leaf}"),
            _Rule(rf"{_HF_STAGE}shortcut\.convolution{_LEAF}", "layer{s1}.{b}.downsample.0.{leaf}"),
            _Rule(rf"{_HF_STAGE}shortcut\.normalization{_LEAF}", "layer{s1}.{b}.downsample.1.{leaf}"),
        ),
        (_Rule(rf"classifier\.1{_LEAF}", "head.fc.{leaf}"),),
    ),
    _Family(
        "mmseg's ViT names",
        (
            _Rule(r"(?P<all>cls_token|pos_embed)", "{all}"),
            _Rule(rf"patch_embed\.proj{_LEAF}", "patch_embed.projection.{leaf}"),
            _Rule(rf"{_BLOCK}norm(?P<k>\d){_LEAF}", "layers.{i}.ln{k}.{leaf}"),
            _Rule(rf"{_BLOCK}attn\.qkv{_LEAF}", "layers.{i}.attn.attn.in_proj_{leaf}"),
            _Rule(rf"{_BLOCK}attn\.proj{_LEAF}", "layers.{i}.attn.attn.out_proj.{leaf}"),
            _Rule(rf"{_BLOCK}mlp\.fc1{_LEAF}", "layers.{i}.ffn.layers.0.0.{leaf}"),
            _Rule(rf"{_BLOCK}mlp\.fc2{_LEAF}", "layers.{i}.ffn.layers.1.{leaf}"),
            _Rule(rf"norm{_LEAF}", "ln1.{leaf}"),
        ),
    ),
    _Family(
        "mmpretrain's ViT names",
        (
            _Rule(r"(?P<all>cls_token|pos_embed)", "{all}"),
            _Rule(rf"patch_embed\.proj{_LEAF}", "patch_embed.projection.{leaf}"),
            _Rule(rf"{_BLOCK}norm(?P<k>\d){_LEAF}", "layers.{i}.ln{k}.{leaf}"),
            _Rule(rf"{_BLOCK}attn\.(?P<k>qkv|proj){_LEAF}", "layers.{i}.attn.{k}.{leaf}"),
            _Rule(rf"{_BLOCK}mlp\.fc1{_LEAF}", "layers.{i}.ffn.layers.0.0.{leaf}"),
            _Rule(rf"{_BLOCK}mlp\.fc2{_LEAF}", "layers.{i}.ffn.layers.1.{leaf}"),
            _Rule(rf"norm{_LEAF}", "ln1.{leaf}"),
        ),
        (_Rule(rf"head{_LEAF}", "head.layers.head.{leaf}"),),
    ),
    _Family(
        "mmseg's ViT names",
        (
            _Rule(r"(?:\w+\.)?embeddings\.cls_token", "cls_token"),
            _Rule(r"(?:\w+\.)?embeddings\.position_embeddings", "pos_embed"),
            _Rule(rf"(?:\w+\.)?embeddings\.patch_embeddings\.projection{_LEAF}", "patch_embed.projection.{leaf}"),
            _Rule(rf"{_HF_VIT}layernorm_before{_LEAF}", "layers.{i}.ln1.{leaf}"),
            _Rule(rf"{_HF_VIT}layernorm_after{_LEAF}", "layers.{i}.ln2.{leaf}"),
            *(
                _Rule(rf"{_HF_VIT}attention\.attention\.{name}{_LEAF}", "layers.{i}.attn.attn.in_proj_{leaf}", part, 3)
                for part, name in enumerate(_QKV)
            ),
            _Rule(rf"{_HF_VIT}attention\.output\.dense{_LEAF}", "layers.{i}.attn.attn.out_proj.{leaf}"),
            _Rule(rf"{_HF_VIT}intermediate\.dense{_LEAF}", "layers.{i}.ffn.layers.0.0.{leaf}"),
            _Rule(rf"{_HF_VIT}output\.dense{_LEAF}", "layers.{i}.ffn.layers.1.{leaf}"),
            _Rule(rf"(?:\w+\.)?layernorm{_LEAF}", "ln1.{leaf}"),
        ),
    ),
    _Family(
        "mmseg's MiT names",
        (
            _Rule(rf"{_HF_MIT_STAGE}patch_embeddings\.(?P<s>\d+)\.proj{_LEAF}", "layers.{s}.0.projection.{leaf}"),
            _Rule(rf"{_HF_MIT_STAGE}patch_embeddings\.(?P<s>\d+)\.layer_norm{_LEAF}", "layers.{s}.0.norm.{leaf}"),
            _Rule(rf"{_HF_MIT}layer_norm_(?P<k>\d){_LEAF}", _MM_MIT + "norm{k}.{leaf}"),
            *(
                _Rule(rf"{_HF_MIT}attention\.self\.{name}{_LEAF}", _MM_MIT + "attn.attn.in_proj_{leaf}", part, 3)
                for part, name in enumerate(_QKV)
            ),
            _Rule(rf"{_HF_MIT}attention\.self\.sr{_LEAF}", _MM_MIT + "attn.sr.{leaf}"),
            _Rule(rf"{_HF_MIT}attention\.self\.layer_norm{_LEAF}", _MM_MIT + "attn.norm.{leaf}"),
            _Rule(rf"{_HF_MIT}attention\.output\.dense{_LEAF}", _MM_MIT + "attn.attn.out_proj.{leaf}"),
            _Rule(rf"{_HF_MIT}mlp\.dense1\.(?P<leaf>weight)", _MM_MIT + "ffn.layers.0.{leaf}", tail=(1, 1)),
            _Rule(rf"{_HF_MIT}mlp\.dense2\.(?P<leaf>weight)", _MM_MIT + "ffn.layers.4.{leaf}", tail=(1, 1)),
            _Rule(rf"{_HF_MIT}mlp\.dense1{_LEAF}", _MM_MIT + "ffn.layers.0.{leaf}"),
            _Rule(rf"{_HF_MIT}mlp\.dense2{_LEAF}", _MM_MIT + "ffn.layers.4.{leaf}"),
            _Rule(rf"{_HF_MIT}mlp\.dwconv\.dwconv{_LEAF}", _MM_MIT + "ffn.layers.1.{leaf}"),
            _Rule(rf"{_HF_MIT_STAGE}layer_norm\.(?P<s>\d+){_LEAF}", "layers.{s}.2.{leaf}"),
        ),
    ),
)
