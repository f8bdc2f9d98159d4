"""Recipes: what they mean, what they inherit, and how they say what is wrong with them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fdsurgery
from fdsurgery import RecipeError
from fdsurgery.discovery.site import Site
from fdsurgery.recipe import check_rules_matched, detect_recipe, load_recipe, parse_recipe, shipped_recipes
from fdsurgery.recipe.conditions import Where
from fdsurgery.recipe.rules import FineTune
from fdsurgery.recipe.yaml_source import parse_yaml

SPATIAL = Site("stages.1.conv2", "conv", "spatial", 64, 128, (3, 3), (2, 2), groups=2, layer_class="Conv2dSame")
LINEAR = Site("blocks.0.mlp.fc1", "linear", "expand", 96, 384, aliases=("again.fc1",), parent_class="Mlp")
TALL = Site("tall", "conv", "depthwise", 16, 16, (7, 1), groups=16)


@pytest.mark.parametrize(
    ("where", "meant"),
    [
        ("{kind: conv}", {SPATIAL, TALL}),
        ("{kind: [conv, linear]}", {SPATIAL, LINEAR, TALL}),
        ("{role: ffn}", {LINEAR}),
        ("{role: [spatial, ffn]}", {SPATIAL, LINEAR}),
        ("{role: gate}", set()),
        ("{name: 'stages.*'}", {SPATIAL}),
        ("{name: ['tall', '*.fc?']}", {LINEAR, TALL}),
        ("{name: again.fc1}", {LINEAR}),
        ("{name: fc1}", set()),
        ("{name: Tall}", set()),
        ("{name: 're:(stages|blocks)\\.\\d+\\..*'}", {SPATIAL, LINEAR}),
        ("{name: 're:stages'}", set()),
        ("{kernel_size: 3}", {SPATIAL}),
        ("{kernel_size: [3, '7x1']}", {SPATIAL, TALL}),
        ("{kernel_size: '1x7'}", set()),
        ("{kernel_size: 1}", set()),
        ("{channels: {min: 17}}", {SPATIAL, LINEAR}),
        ("{channels: {max: 128}}", {SPATIAL, TALL}),
        ("{channels: {min: 16, max: 127}}", {TALL}),
        ("{channels: 16}", {TALL}),
        ("{in_channels: 64}", {SPATIAL}),
        ("{out_channels: {min: 128}}", {SPATIAL, LINEAR}),
        ("{stride: 2}", {SPATIAL}),
        ("{stride: 1}", {TALL}),
        ("{groups: 1}", set()),
        ("{groups: {min: 2, max: 8}}", {SPATIAL}),
        ("{parent: Mlp}", {LINEAR}),
        ("{layer: 'Conv2d*'}", {SPATIAL}),
        ("{kind: conv, kernel_size: 3, channels: {min: 17}}", {SPATIAL}),
        ("{kind: linear, kernel_size: 3}", set()),
    ],
)
def test_conditions_mean_what_they_say(where: str, meant: set[Site]) -> None:
    rule = parse_recipe(f"swap: [{{where: {where}}}]").swap[0]
    assert {site for site in (SPATIAL, LINEAR, TALL) if rule.matches(site)} == meant
    keep = parse_recipe(f"keep: [{{because: x, {where[1:]}]").keep[0]
    assert {site for site in (SPATIAL, LINEAR, TALL) if keep.matches(site)} == meant


def test_keep_wins_over_swap_and_the_first_swap_over_later_ones(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "keep:\n"
        "- {name: 'layer2.*', because: second stage}\n"
        "swap:\n"
        "- {where: {name: 'layer[12].*', kernel_size: 3}, with: {kernel_num: 4}}\n"
        "- {where: {kernel_size: 3}, with: {kernel_num: 8, bands: [2]}}\n"
    )
    plan = fdsurgery.plan(timm.create_model("resnet18"), recipe=file)
    assert plan.recipe == "mine" and plan.recognised == "named by the caller"
    for decision in plan.decisions:
        if decision.site.name.startswith("layer2."):
            assert (decision.reason, decision.rule) == ("second stage", f"{file}:2")
        elif decision.site.name.startswith("layer1."):
            assert decision.rule == f"{file}:4" and decision.settings["kernel_num"] == 4
        elif decision.site.kernel_size == (3, 3) and decision.site.role == "spatial":
            assert decision.rule == f"{file}:5" and decision.settings["bands"] == [2]
        else:
            assert not decision.swap and decision.reason


def test_inherited_rules_come_after_own_ones_and_once(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "base.yaml").write_text("swap: [{where: {name: base}}]\nkeep: [{name: k, because: b}]")
    (tmp_path / "left.yaml").write_text(
        "extends: folder/base.yaml\nmatch: {timm: left*}\nswap: [{where: {name: left}}]"
    )
    (tmp_path / "right.yaml").write_text("extends: folder/../folder/base.yaml\nswap: [{where: {name: right}}]")
    (tmp_path / "child.yml").write_text("extends: [left.yaml, right.yaml, ffn]\nswap: [{where: {name: child}}]")
    recipe = load_recipe(str(tmp_path / "child.yml"))
    assert [rule.describe() for rule in recipe.swap] == [
        "name child", "name left", "name base", "name right", "role ffn",
    ]  # fmt: skip
    assert len(recipe.keep) == 1
    assert recipe.name == "child" and recipe.match.timm == (), "a family is recognised by its own recipe alone"


def test_how_to_train_is_inherited(tmp_path: Path) -> None:
    (tmp_path / "far.yaml").write_text("finetune: {layer_decay: 0.5}")
    (tmp_path / "left.yaml").write_text("extends: far.yaml")
    (tmp_path / "right.yaml").write_text("finetune: {layer_decay: 0.75}")
    (tmp_path / "child.yaml").write_text("extends: [left.yaml, right.yaml]")
    assert load_recipe(tmp_path / "child.yaml").finetune == FineTune(layer_decay=0.5), "the first parent that says"
    (tmp_path / "child.yaml").write_text("extends: [ffn, right.yaml]")
    assert load_recipe(tmp_path / "child.yaml").finetune == FineTune(layer_decay=0.75)
    (tmp_path / "child.yaml").write_text("extends: right.yaml\nfinetune: {layer_decay: 1}")
    assert load_recipe(tmp_path / "child.yaml").finetune == FineTune(layer_decay=1), (
        "the own one first, be it the default"
    )
    assert parse_recipe("extends: resnet").finetune == FineTune(layer_decay=None)


def test_recipes_that_extend_each_other_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("description: x\nextends:\n- ffn\n- a.yaml")
    with pytest.raises(RecipeError, match=r"b\.yaml:4:3: extends\[1\]: .* itself: a\.yaml -> b\.yaml -> a\.yaml"):
        load_recipe(tmp_path / "a.yaml")


# Errors

BROKEN = {
    "unknown key": ("swap: []\nswop: []", "2:1: swop: no such key; known: .*did you mean 'swap'"),
    "unknown condition": (
        "swap:\n- where:\n    kind: conv\n    kernel_sze: 3",
        r"4:5: swap\[0\]\.where\.kernel_sze: no such key; .*did you mean 'kernel_size'",
    ),
    "unknown condition of keep": (
        "keep:\n- {nam: x, because: x}",
        r"2:4: keep\[0\]\.nam: no such key; .*did you mean 'name'",
    ),
    "unknown library": ("match: {tim: x}", r"1:9: match\.tim: no such key; .*did you mean 'timm'"),
    "unknown role": (
        "swap:\n- where: {role: [ffn, shortcuts]}",
        r"2:11: swap\[0\]\.where\.role: 'shortcuts' is none of .*did you mean 'shortcut'",
    ),
    "unknown kind": (
        "swap: [{where: {kind: conv2d}}]",
        r"1:17: .*'conv2d' is none of conv, linear; did you mean 'conv'",
    ),
    "unknown setting": (
        "swap:\n- where: {kind: conv}\n  with:\n    kernel_num: 3\n    kernel_nums: 4",
        r"5:5: swap\[0\]\.with\.kernel_nums: 'kernel_nums' is no setting of fdconv; .*did you mean 'kernel_num'",
    ),
    "bad setting": (
        "swap:\n- where: {kind: conv}\n  with: {kernel_num: many}",
        r"3:10: swap\[0\]\.with\.kernel_num: .*must be a whole number from 1, not 'many'",
    ),
    "unknown operator": (
        "swap:\n- where: {kind: conv}\n  operator: fdcnov",
        r"3:3: swap\[0\]\.operator: no operator is called 'fdcnov'; .*did you mean 'fdconv'",
    ),
    "no reason": ("keep:\n\n- {name: x}", r"3:3: keep\[0\]: 'because' is missing: say why"),
    "empty reason": ("keep: [{name: x, because: ''}]", r"1:18: keep\[0\]\.because: string should have at least 1"),
    "no where": ("swap: [{with: {}}]", r"1:8: swap\[0\]: 'where' is missing"),
    "empty where": ("swap: [{where: {}}]", r"1:9: swap\[0\]\.where: says which sites by none of kind, role"),
    "keep without conditions": ("keep: [{because: x}]", r"1:8: keep\[0\]: says which sites by none of"),
    "empty list": ("swap: [{where: {name: []}}]", r"name: the list is empty"),
    "bad expression": ("swap: [{where: {name: 're:(x'}}]", r"1:17: .*'re:\(x' is no regular expression: missing \)"),
    "bad size": ("swap: [{where: {kernel_size: 0}}]", "expected a number such as 3 .* not 0"),
    "bad size text": ("swap: [{where: {kernel_size: 3x}}]", "expected a number such as 3 .* not '3x'"),
    "bad range": ("swap: [{where: {channels: {least: 3}}}]", r"expected a number, or \{min: 17\}"),
    "empty range": ("swap: [{where: {channels: {min: 9, max: 3}}}]", "min 9 is above max 3"),
    "yes is no number": ("swap: [{where: {groups: yes}}]", r"1:1\d: swap\[0\]\.where\.groups: yes is a truth value"),
    "true is no number": ("swap: [{where: {groups: true}}]", "expected a number, .*not True"),
    "swap is a mapping": ("swap: {where: {kind: conv}}", "1:1: swap: .*valid tuple, not a mapping"),
    "entry is text": ("swap: [conv]", r"1:8: swap\[0\]: .*, not 'conv'"),
    "description is a number": ("description: 3", "1:1: description: expected text, not 3; put it in quotes"),
    "optional is text": ("swap: [{where: {kind: conv}, optional: 'no'}]", r"1:30: swap\[0\]\.optional: .*not 'no'"),
    "unknown key of training": (
        "finetune:\n  layr_decay: 0.5",
        r"2:3: finetune\.layr_decay: no such key; known: .*did you mean 'layer_decay'",
    ),
    "spectra at another rate": (
        "finetune: {spectrum_lr_scale: 4}",
        r"1:12: finetune\.spectrum_lr_scale: this key is gone and needs no successor: .*; delete the line",
    ),
    "modulation at another rate": (
        "finetune:\n  layer_decay: 0.5\n  modulation_lr_scale: 10",
        r"3:3: finetune\.modulation_lr_scale: this key is gone and has no successor: .*; delete the line",
    ),
    "decay of all": ("finetune: {layer_decay: 0}", r"1:12: finetune\.layer_decay: .*than 0, not 0"),
    "decay above one": ("finetune: {layer_decay: 1.5}", r"1:12: finetune\.layer_decay: .*equal to 1, not 1\.5"),
    "decay is text": ("finetune: {layer_decay: '2'}", r"1:12: .*valid number, not '2'"),
    "decay is true": ("finetune: {layer_decay: true}", r"1:12: .*valid number, not True"),
    "decay is no number": ("finetune: {layer_decay: .nan}", r"1:12: finetune\.layer_decay: .*not nan"),
    "rates are a number": ("finetune: 3", "1:1: finetune: .*, not 3"),
    "a list": ("- swap", "1:1: a recipe is a mapping of description, .*not a list"),
    "a word": ("swap", "1:1: a recipe is a mapping of .*not 'swap'"),
    "empty": ("", "1:1: the file is empty"),
    "comment": ("# nothing\n", "1:1: the file is empty"),
    "duplicate key": ("swap: []\nkeep: []\nswap: []", "3:1: swap: 'swap' is here twice; the first is on line 1"),
    "two documents": ("swap: []\n---\nswap: []", "2:1: a second document begins here"),
    "bad indent": ("swap:\n - a\n- b", "3:1: "),
    "unclosed": ("swap: [", "1:8: "),
    "tab": ("swap:\n\t- x", "2:1: "),
    "a tag": ("swap: !!python/object/apply:os.system [ls]", "1:1: swap: the tag .*python.* is not allowed"),
    "a binary": ("description: !!binary aGk=", "the tag !!binary is not allowed"),
    "merge": ("a: &a {kind: conv}\nswap: [{where: {<<: *a}}]", "merge keys .*extends"),
    "number as key": ("3: x", r"1:1: .*keys are text, not 3"),
    "list as key": ("[a]: x", r"1:1: .*keys are text"),
    "recursive": ("swap: &a [*a]", "this anchor holds itself"),
    "unknown alias": ("swap: *nowhere", "1:7: .*undefined alias"),
    "control character": ("description: a\n\x07", "2:1: the character"),
    "no such parent": (
        "description: x\nextends: resnett",
        "2:1: extends: no recipe is called 'resnett'; .*did you mean 'resnet'",
    ),
    "no such parent file": ("extends: [ffn, absent.yaml]", r"1:16: extends\[1\]: .*absent\.yaml: no such file"),
}  # fmt: skip


@pytest.mark.parametrize("text,message", BROKEN.values(), ids=BROKEN)
def test_errors_name_the_place_and_what_is_right(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    said = str(caught.value)
    assert re.match(rf"{re.escape(str(file))}:\d+:\d+: ", said), said
    assert re.search(message, said.removeprefix(f"{file}:")), said
    assert "\n" not in said


def test_aliases_may_repeat_but_not_multiply() -> None:
    assert len(parse_recipe("swap: [{where: &w {kind: conv}}, {where: *w}]").swap) == 2
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 8):
        bomb += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    with pytest.raises(RecipeError, match="do aliases multiply"):
        parse_recipe(bomb)


@pytest.mark.parametrize("opened", ["[", "{a: ", "- "])
def test_depth_is_limited(opened: str) -> None:
    for levels in (100, 20_000):
        with pytest.raises(RecipeError, match=r"nested|deep|not YAML|expected"):
            parse_recipe(opened * levels)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"description: x\nsource: caf\xe9")
    with pytest.raises(RecipeError, match=r"latin\.yaml:2:1: not UTF-8: byte 0xe9"):
        load_recipe(tmp_path / "latin.yaml")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfextends: ffn\r\n")
    assert len(load_recipe(tmp_path / "bom.yaml").swap) == 1
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match=r"folder\.yaml: a folder"):
        load_recipe(tmp_path / "folder.yaml")
    with pytest.raises(RecipeError, match=r"latim\.yaml: no such file; did you mean 'latin\.yaml'"):
        load_recipe(tmp_path / "latim.yaml")
    (tmp_path / "long.yaml").write_text("#" * 2_000_000)
    with pytest.raises(RecipeError, match="no recipe is that long"):
        load_recipe(tmp_path / "long.yaml")
    with pytest.raises(RecipeError, match=r"no recipe is called 'sesnet'.*did you mean 'resnet'"):
        load_recipe("sesnet")
    with pytest.raises(RecipeError):
        load_recipe("nul\0byte")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e1", 10.0), ("1e-4", 1e-4), ("1E5", 1e5), (".5", 0.5), ("+1e-3", 1e-3), ("5.", 5.0), ("-1.5e+2", -150.0)),
        *(("0", 0), ("-3", -3), ("+7", 7), ("0.10", 0.1), ("true", True), ("False", False), ("~", None), ("", None)),
        *(("2024-01-01", "2024-01-01"), ("1.2.3", "1.2.3"), ("1x7", "1x7"), ("e5", "e5"), ("=", "="), ("nan", "nan")),
        *(("'010'", "010"), ('"yes"', "yes"), ("'1e1'", "1e1"), ("!!str 010", "010"), ("yesterday", "yesterday")),
    ],
)
def test_scalars_are_what_people_mean(text: str, value: object) -> None:
    found = parse_yaml(f"a: {text}", "recipe.yaml").data["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "says"),
    {
        "010": r'octal in YAML 1\.1 and decimal in YAML 1\.2; write 10, or "010" if it is text',
        "-007": r"write -7, or",
        "00": r"write 0, or",
        "1:30": r'base 60 in YAML 1\.1; write "1:30" if it is text',
        "0x10": r'plain decimal digits, or "0x10"',
        "0o17": "plain decimal digits",
        "0b11": "plain decimal digits",
        "1_000": "plain decimal digits",
        "1_0.5e3": "plain decimal digits",
        **dict.fromkeys(("yes", "On", "y", "Y"), 'write true, or ".*" if it is text'),
        **dict.fromkeys(("no", "OFF", "n"), 'write false, or ".*" if it is text'),
        "9" * 101: "101 digits",
        "!!int 3": "the tag !!int is not allowed",
        "!!float 1e1": "the tag !!float is not allowed",
    }.items(),
)
def test_scalars_that_mean_different_things_are_refused_with_their_place(text: str, says: str) -> None:
    for document, place in ((f"b: 1\na: {text}", r"2:1: a: "), (f"b: [1,\n {text}]", r"2:2: b\[1\]: ")):
        with pytest.raises(RecipeError, match=rf"^recipe\.yaml:{place}.*{says}"):
            parse_yaml(document, "recipe.yaml")
    with pytest.raises(RecipeError, match=says):  # as a key, too
        parse_yaml(f"{text}: 1" if not text.startswith("!!") else f"? {text}\n: 1", "recipe.yaml")


def test_numbers_of_recipes_as_people_write_them() -> None:
    recipe = parse_recipe("swap: [{where: {role: ffn}, with: {reduction: 1e-1}}]\nfinetune: {layer_decay: 5e-1}")
    assert recipe.finetune.layer_decay == 0.5 and recipe.swap[0].settings == {"reduction": 0.1}
    with pytest.raises(RecipeError, match=r"1:1: description: expected text, not 100000\.0; put it in quotes"):
        parse_recipe("description: 1e5\nextends: ffn")
    with pytest.raises(RecipeError, match=r"kernel_num: .* whole number from 1, not 10\.0"):
        parse_recipe("swap: [{where: {role: ffn}, with: {kernel_num: 1e1}}]")


PIECES = st.sampled_from(
    "swap keep match where with extends kind conv linear role ffn name kernel_size channels min max because optional "
    ": - [ ] { } , & * ! | > ' \" # % @ ` \n --- ... ? << re:( 1 -3 1e999 0x yes null ~ "
    "\t é \x00 \ud800 !!float !!bool &a *a".split(" ")
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.lists(PIECES, max_size=30).map(" ".join), st.text(max_size=60)))
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    try:
        parse_recipe(text)
    except RecipeError as error:
        assert str(error).startswith("recipe.yaml:")


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["min", "max", "x"]), inner)),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(
        [*Where.model_fields, "because", "optional", "with", "operator", "where", "layer_decay", "spectrum_lr_scale"]
    ),
    VALUES,
    st.sampled_from(["keep", "swap", "where", "finetune", "top"]),
)
def test_any_value_is_a_recipe_or_a_recipe_error(key: str, value: object, place: str) -> None:
    import json

    entry = json.dumps({key: value})  # JSON is YAML
    text = {
        "keep": f"keep: [{entry}]", "swap": f"swap: [{entry}]", "where": f"swap: [{{where: {entry}}}]",
        "finetune": f"finetune: {entry}", "top": entry
    }[place]  # fmt: skip
    try:
        parse_recipe(text)
    except RecipeError as error:
        assert str(error).startswith("recipe.yaml:1:")


# Rules that match nothing


def test_a_rule_that_matches_nothing_is_an_error_with_near_misses(tmp_path: Path) -> None:
    model = timm.create_model("resnet18")
    file = tmp_path / "mine.yaml"
    file.write_text("extends: resnet\nkeep:\n- {name: 'layre1.0.conv1', because: x}")
    with pytest.raises(
        RecipeError,
        match=r"mine\.yaml:3:3: keep\[0\]: no site .* has name layre1\.0\.conv1; nearest: 'layer1\.0\.conv1'",
    ):
        fdsurgery.plan(model, recipe=file)
    file.write_text("swap:\n- where: {kind: conv, kernel_size: 5}")
    with pytest.raises(
        RecipeError, match=r"mine\.yaml:2:3: .*kernel_size 5x5; nearest: 'conv1', whose kernel_size is 7x7"
    ):
        fdsurgery.plan(model, recipe=file)
    with pytest.raises(RecipeError, match=r"ffn\.yaml:5:5: .*role ffn; nearest: .*role is stem"):
        fdsurgery.plan(model, recipe="ffn")
    file.write_text("extends: resnet\nkeep:\n- {name: 'layre1.0.conv1', because: x, optional: true}")
    assert len(fdsurgery.plan(model, recipe=file).swaps) == 16


def test_a_model_without_sites_says_so() -> None:
    with pytest.raises(RecipeError, match="the model has no convolution or linear layer"):
        check_rules_matched(load_recipe("ffn"), [])


# The shipped recipes


def test_shipped_recipes_are_in_order() -> None:
    names = set(shipped_recipes())
    assert {"resnet", "convnext", "swin", "vit", "segformer", "generic", "ffn"} <= names
    for name in names:
        recipe = load_recipe(name)
        assert recipe.name == name and recipe.description and recipe.swap
        assert all(rule.optional for rule in recipe.keep), (
            "a shipped keep must not fail on the next model of the family"
        )


def test_no_timm_model_is_claimed_by_two_recipes() -> None:
    from fdsurgery.recipe.conditions import matches_any

    globs = {name: load_recipe(name).match.timm for name in shipped_recipes()}
    for model in timm.list_models():
        claims = [name for name, patterns in globs.items() if matches_any(patterns, model)]
        assert len(claims) <= 1, (model, claims)


def test_families_are_recognised() -> None:
    import torchvision

    with torch.device("meta"):
        models = {
            "resnet": [timm.create_model("resnext50_32x4d"), torchvision.models.resnet18()],
            "convnext": [timm.create_model("convnext_nano", features_only=True), torchvision.models.convnext_tiny()],
            "swin": [timm.create_model("swinv2_tiny_window8_256"), torchvision.models.swin_t()],
            "vit": [timm.create_model("deit_tiny_patch16_224"), torchvision.models.vit_b_16()],
            "segformer": [transformers.SegformerModel(transformers.SegformerConfig())],
            "generic": [timm.create_model("ghostnet_050"), torchvision.models.alexnet(), nn.Linear(3, 3)],
        }
    for name, family in models.items():
        for model in family:
            found, how = detect_recipe(model)
            assert found == name, (type(model), how)
            assert how


def test_a_timm_model_inside_transformers_is_recognised_by_its_architecture() -> None:
    config = transformers.TimmWrapperConfig(architecture="resnet18")
    assert detect_recipe(transformers.TimmWrapperModel(config))[0] == "resnet"


# Composite models


class Segmenter(nn.Module):
    """A backbone that is recognised, one that is not, and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("resnet18", features_only=True, out_indices=(1, 2))
        self.decoder = nn.ModuleDict({"conv": nn.Conv2d(128, 32, 3), "out": nn.Conv2d(32, 5, 1)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder["out"](self.decoder["conv"](self.backbone(x)[-1]).relu())


def decided(text: str, **kwargs: object) -> dict[str, str]:
    plan = fdsurgery.plan(Segmenter(), parse_recipe(text), **kwargs)
    return {decision.site.name: decision.rule or decision.reason for decision in plan.decisions if decision.swap}


def test_a_part_is_decided_by_its_own_recipe() -> None:
    by = decided("delegate: {backbone: auto}\nswap: [{where: {name: 'decoder.*', kernel_size: 3}}]")
    assert by.pop("decoder.conv") == "recipe.yaml:2"
    assert all(rule.startswith("resnet.yaml:") for rule in by.values()) and len(by) == 8
    assert all(name.startswith("backbone.layer") for name in by)


def test_keep_comes_before_the_part_and_swap_after() -> None:
    by = decided(
        "delegate: {'*bone': resnet}\nkeep: [{name: 'backbone.layer1.*', because: x}]\n"
        "swap: [{where: {role: [spatial, stem]}}]"
    )
    assert {name.split(".")[1] for name in by} == {"layer2", "conv"}, "the stem is the part's, and the part keeps it"


def test_a_part_that_is_not_there_is_an_error_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"recipe\.yaml:1:12: delegate\.backbon: .*no such part; did you mean 'backbone'"
    ):
        decided("delegate: {backbon: auto}")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:1:12: delegate\.backbone: no recipe is called 'resnett'"):
        decided("delegate: {backbone: resnett}")
    with pytest.raises(RecipeError, match=r"ffn\.yaml:5:5: swap\[0\]: no site of this model has role ffn"):
        decided("delegate: {backbone: ffn}")
    (tmp_path / "part.yaml").write_text("swap: [{where: {name: 'layer1.0.conv1'}}]")
    (tmp_path / "whole.yaml").write_text("delegate: {backbone: part.yaml}")
    plan = fdsurgery.plan(Segmenter(), tmp_path / "whole.yaml")
    assert [decision.site.name for decision in plan.swaps] == ["backbone.layer1.0.conv1"]
    assert plan.swaps[0].rule == f"{tmp_path / 'part.yaml'}:1"
