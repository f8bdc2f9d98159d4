"""The command line, through its own runner and as a user's process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import CASES, small_segformer
from typer.testing import CliRunner

import fdsurgery
from fdsurgery.cli import app

MODEL_FILE = """
import torch

def build():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d
    return torch.nn.Sequential(
        conv(3, 32, 3), torch.nn.ReLU(), conv(32, 32, 3), torch.nn.ReLU(), conv(32, 5, 1),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(5, 4),
    )

def broken():
    raise KeyError("oops")

def leaves():
    raise SystemExit(0)

nothing = 3
"""


@pytest.fixture
def model_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text(MODEL_FILE)
    return tmp_path / "models.py"


def invoke(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def test_plan_prints_a_table_or_json() -> None:
    text = invoke("plan", "timm:resnet18")
    assert "16 of" in text
    plan = json.loads(invoke("plan", "timm:resnet18", "--json", "--set", "kernel_num=16"))
    assert fdsurgery.Plan.from_dict(plan).swaps[0].settings["kernel_num"] == 16


def test_another_operator_takes_the_sites_of_the_recipe(model_file: Path) -> None:
    told = invoke("plan", "models.py:build", "--operator", "odconv", "--set", "kernels=2", "--json")
    swaps = fdsurgery.Plan.from_dict(json.loads(told)).swaps
    assert {swap.operator for swap in swaps} == {"odconv"} and swaps[0].settings["kernels"] == 2
    text = invoke("convert", "models.py:build", "-o", "saved", "--operator", "condconv", "--no-pretrained")
    assert "unchanged" in text and json.loads((model_file.parent / "saved" / "fdsurgery.json").read_text())
    for arguments, said in (
        (["--operator", "odcon"], "no operator is called 'odcon'"),
        (["--operator", "odconv", "--set", "kernel=2"], "did you mean 'kernels'"),
        (["--operator", "odconv", "--set", "kernels=0"], "greater than or equal to 1"),
        (["--set", "kernels=2"], "'kernels' is no setting of fdconv"),
    ):
        assert said in " ".join(invoke("plan", "models.py:build", *arguments, code=2).split())


def test_convert_verifies_and_saves_what_load_reads(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    text = invoke("convert", "timm:resnet18", "-o", str(folder), "--no-pretrained")
    assert "16 of 16 agree layer by layer" in text and f"load it with fdsurgery.load({str(folder)!r})" in text
    assert "16 of 16 swapped layers do not influence the outputs: comparing the outputs proves nothing" in text
    assert "unchanged" not in text, "the last norm of each block is zero"
    report = json.loads(invoke("convert", "timm:resnet18", "-o", str(folder), "--no-pretrained", "--json"))
    assert report["swaps"] == 16 and report["relative_error"] < 1e-5
    assert report["verification"]["ok"] and report["verification"]["layers_compared"] == 16
    assert 0 < report["verification"]["worst_layer"]["relative_error"] < 1e-5
    model = fdsurgery.load(folder)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


def test_convert_writes_nothing_where_a_layer_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = fdsurgery.apply

    def wrong(plan: fdsurgery.Plan, model: torch.nn.Module) -> torch.nn.Module:
        apply(plan, model)
        with torch.no_grad():
            model.get_submodule("layer4.0.conv1").dft_weight.mul_(3)
        return model

    monkeypatch.setattr("fdsurgery.surgery.apply", wrong)
    text = invoke("convert", "timm:test_resnet", "-o", str(tmp_path / "saved"), "--no-pretrained", code=2)
    assert "layers CHANGED: 1 of 9 differ" in text and "'layer4.0.conv1'" in text and "nothing was written" in text
    assert not any(tmp_path.iterdir())


def test_a_local_transformers_folder_is_a_source(tmp_path: Path) -> None:
    model = small_segformer()
    model.save_pretrained(tmp_path / "plain")
    invoke("convert", f"hf:{tmp_path / 'plain'}", "-o", str(tmp_path / "saved"))
    loaded = fdsurgery.load(tmp_path / "saved")
    assert type(loaded) is type(model)
    assert fdsurgery.verify(model, loaded, torch.randn(1, 3, 64, 64)).ok


def test_a_python_file_is_a_source(model_file: Path) -> None:
    assert "2 of 4 sites swapped" in invoke("plan", "models.py:build")
    text = invoke("convert", "models.py:build", "-o", "saved")
    assert "load it with fdsurgery.load('saved', model=build()), build being that of models.py" in text
    plain = fdsurgery.saving.source.build("models.py:build", pretrained=False)[0]
    assert fdsurgery.verify(plain, fdsurgery.load("saved", model=plain), torch.randn(1, 3, 32, 32)).ok


def test_torchvision_is_a_source() -> None:
    plan = json.loads(invoke("plan", "torchvision:resnet18", "--json"))
    assert plan["recipe"] == "resnet" and sum(entry["operator"] is not None for entry in plan["decisions"]) == 16


def test_recipes_are_listed_shown_and_checked(tmp_path: Path) -> None:
    names = {"resnet", "convnext", "swin", "vit", "segformer", "generic"}
    assert names <= set(json.loads(invoke("recipes", "list", "--json")))
    assert all(name in invoke("recipes", "list") for name in names)
    shown = invoke("recipes", "show", "resnet")
    (tmp_path / "mine.yaml").write_text(shown)
    text = invoke("recipes", "check", str(tmp_path / "mine.yaml"))
    assert "well-formed" in text and "fine" not in text and "recipes check" in text
    assert "fits timm:test_resnet, 9 of 16 sites" in invoke("recipes", "check", "resnet", "timm:test_resnet")


@pytest.mark.parametrize(
    ("recipe", "message", "code"),
    [
        ("delegate: {backbone: auto}\nswap: [{where: {kernel_size: 3}}]", "this model has no such part", 2),
        ("keep: [{name: '*', because: x}]\nswap: [{where: {kernel_size: 3}}]", "swaps nothing in timm:test_resnet", 2),
        ("swap: [{where: {kernel_size: 5}}]", "no site of this model has kernel_size 5", 2),
        ("swap:\n- where: {kernel_size: 3}\n- where: {role: spatial}", "swap[1]: decides nothing here", 0),
    ],
)
def test_a_recipe_is_checked_by_what_plan_makes_of_it(tmp_path: Path, recipe: str, message: str, code: int) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(recipe)
    assert message in invoke("recipes", "check", str(file), "timm:test_resnet", code=code)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "timm:resnet5000"], "timm has no model 'resnet5000'; did you mean 'resnet"),
        (["plan", "tim:resnet50"], "'tim:resnet50' names no model; expected timm:NAME"),
        (["plan", "resnet50"], "'resnet50' names no model"),
        (["plan", "torchvision:resnet5"], "torchvision has no model 'resnet5'; did you mean"),
        (["plan", "transformers:ViTModell"], "transformers has no model class 'ViTModell'; did you mean 'ViTModel'"),
        (["convert", "transformers:ViTModel", "-o", "x"], "has no trained weights"),
        (["plan", "hf:no/such-folder-here"], "hf:no/such-folder-here could not be loaded"),
        (["plan", "models.py:biuld"], "has no function 'biuld'; did you mean 'build'?"),
        (["plan", "models.py:broken"], "models.py:broken: KeyError: 'oops'"),
        (["convert", "models.py:leaves", "-o", "x"], "models.py:leaves: SystemExit: 0"),
        (["plan", "models.py:[/red]"], "models.py has no function '[/red]'"),
        (["plan", "models.py:nothing"], "has no function 'nothing'"),
        (["plan", "missing.py:build"], "missing.py: no such file"),
        (["plan", "models.py:build", "--recipe", "resnett"], "did you mean 'resnet'"),
        (["plan", "models.py:build", "--recipe", "none.yaml"], "none.yaml"),
        (["plan", "models.py:build", "--set", "kernel_num"], "--set takes KEY=VALUE"),
        (["plan", "models.py:build", "--set", "kernel_nums=3"], "did you mean 'kernel_num'"),
        (["plan", "models.py:build", "--set", "kernel_num=many"], "kernel_num"),
        (["plan", "models.py:build", "--set", "kernel_num=[1"], "--set kernel_num:1:3: expected ',' or ']'"),
        (["plan", "models.py:build", "--set", "kernel_num=010"], "write 10"),
        (["convert", "models.py:build", "-o", "models.py"], "models.py is a file; give a folder"),
        (["convert", "models.py:build", "-o", "."], "is not empty"),
        (["recipes", "show", "resnext"], "no shipped recipe is called 'resnext'"),
        (["recipes", "check", "bad.yaml"], "bad.yaml:2:1"),
        (["recipes", "check", "absent.yaml"], "absent.yaml"),
    ],
)
def test_bad_input_is_answered_in_two_lines(model_file: Path, arguments: list[str], message: str) -> None:
    Path("bad.yaml").write_text("description: x\nswop: []\n")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2
    assert "Traceback" not in result.output
    assert sorted(path.name for path in Path().iterdir() if path.name != "__pycache__") == ["bad.yaml", "models.py"]


def test_reasons_are_printed_as_they_are(model_file: Path) -> None:
    Path("mine.yaml").write_text(
        "swap: [{where: {kind: conv}}]\nkeep: [{name: '2', because: 'see [/red] :warning:'}]\n"
    )
    assert {"[/red]", ":warning:"} <= set(invoke("plan", "models.py:build", "-r", "mine.yaml").split())


def test_the_command_as_a_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fdsurgery.cli", "plan", "timm:resnet5000"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: timm has no model")


def test_importing_the_library_is_light() -> None:
    code = (
        "import sys, time, torch; start = time.perf_counter(); import fdsurgery; took = time.perf_counter() - start; "
        "assert not {'timm', 'transformers', 'torchvision', 'matplotlib'} & set(sys.modules), 'heavy import'; "
        "print(took)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 3, "well under a second on an idle machine"


def test_cases_name_shipped_recipes() -> None:
    assert {case.recipe for case in CASES.values()} <= set(fdsurgery.shipped_recipes())
