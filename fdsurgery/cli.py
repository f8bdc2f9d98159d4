"""The command line: parses, calls the library, prints. Bad input is answered in a line or two, with exit code 2."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from .errors import SurgeryError, near_misses
from .integrations import match_keys
from .report import kind_of, shape_of
from .saving.source import build, forms, library_of_source


def _console(**options: Any) -> Console:
    """One that prints text as it is: `[name]` is no markup, and `:name:` no picture."""
    return Console(markup=False, emoji=False, **options)


class OneMessageGroup(typer.core.TyperGroup):
    """Errors raised on purpose become one message and exit code 2; others are ours and keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SurgeryError as error:
            _console(stderr=True).print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=OneMessageGroup,
    help="Swap the convolutions and FFN linears of a vision model for dynamic ones, without changing what it computes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipes_app = typer.Typer(help="List, show and check recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
checkpoint_app = typer.Typer(help="Convert checkpoints on disk.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")

out = _console()

Spec = Annotated[
    str,
    typer.Argument(
        metavar="SPEC",
        help=forms(),
    ),
]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", help="auto, a shipped recipe's name, or a YAML file")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="an operator setting, e.g. kernel_num=16")
]
OperatorOption = Annotated[
    str | None, typer.Option("--operator", metavar="NAME", help="an operator for all rules, e.g. odconv")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


@app.command()
def plan(
    spec: Spec,
    recipe: RecipeOption = "auto",
    operator: OperatorOption = None,
    set_: SetOption = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="load trained weights; a plan does not need them")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a conversion would do to a model, site by site. Nothing is written."""
    from .planning import plan as make_plan

    settings = _settings(set_)
    with _working(f"building {spec}", quiet=as_json):
        model, _ = build(spec, pretrained=pretrained)
    with _working("planning", quiet=as_json):
        made = make_plan(model, _recipe(recipe), operator=operator, **settings)
    if as_json:
        print(json.dumps(made.to_dict(), indent=1))
    else:
        out.print(made)


@app.command()
def convert(
    spec: Spec,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="folder for the converted model")],
    recipe: RecipeOption = "auto",
    operator: OperatorOption = None,
    set_: SetOption = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="load trained weights, or draw random ones")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Convert a model, verify it layer by layer and as a whole, and save it for fdsurgery.load."""
    from .discovery import example_inputs
    from .planning import plan as make_plan
    from .saving.folder import save
    from .surgery import apply
    from .verification import verify

    settings = _settings(set_)
    with _working(f"building {spec}", quiet=as_json):
        model, source = build(spec, pretrained=pretrained)
    with _working("planning", quiet=as_json):
        made = make_plan(model, _recipe(recipe), operator=operator, **settings)
    if not as_json:
        out.print(made)
    with _working("converting", quiet=as_json):
        before = copy.deepcopy(model)
        apply(made, model)
    with _working("verifying", quiet=as_json):
        checked = verify(before, model, example_inputs(model))
    if checked.changed or checked.worst is None:
        raise SurgeryError(f"{checked}; nothing was written")
    with _working("saving", quiet=as_json):
        save(model, output, source=source, plan=made)
    if as_json:
        verification = checked.to_dict()
        report = {
            "folder": str(output),
            "swaps": len(made.swaps),
            "parameters_added": made.parameters_added,
            "multiply_adds_added": made.multiply_adds_added,
            "relative_error": verification["relative_error"],
            "verification": verification,
            "plan": made.to_dict(),
        }
        print(json.dumps(report, indent=1))
    else:
        _say(str(checked))
        load_line = library_of_source(source).load_line(str(output), source)
        _say(f"saved to {output}; load it with {load_line}")


@checkpoint_app.callback()
def checkpoint() -> None:
    """Convert checkpoints on disk."""


@checkpoint_app.command("convert")
def convert_checkpoint(
    source: Annotated[Path, typer.Argument(metavar="IN", help="a checkpoint: file, index, or folder")],
    destination: Annotated[
        Path, typer.Argument(metavar="OUT", help="a folder, or a file that ends in .safetensors, .pth, .pt or .bin")
    ],
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="SPEC", help="the model it is of")] = None,
    recipe: RecipeOption = "auto",
    to: Annotated[str, typer.Option(help="ours, or official for the authors' code")] = "ours",
    form: Annotated[str, typer.Option("--from", help="plain, official, ours, or auto to see by its tensors")] = "auto",
    key: Annotated[str | None, typer.Option(help="entry of a pickled checkpoint, e.g. model_ema")] = None,
    operator: OperatorOption = None,
    set_: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan; write nothing")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint without building its model: plain to dynamic, official to ours, and back to official."""
    from .checkpoints import carry_out, plan_checkpoint

    settings = _settings(set_)
    with _working(f"planning {source}", quiet=as_json):
        made = plan_checkpoint(
            source,
            destination,
            model=model,
            recipe=_recipe(recipe),
            to=to,
            source_form=form,
            key=key,
            operator=operator,
            settings=settings,
        )
    if as_json:
        print(json.dumps(made.to_dict(), indent=1))
    else:
        _say(str(made))
    if dry_run:
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console(stderr=True, quiet=as_json)) as progress:
        task = progress.add_task("converting", total=made.nbytes)
        carry_out(made, lambda count: progress.advance(task, count))
    if not as_json:
        _say(f"written to {destination}")


@recipes_app.command("list")
def list_recipes(as_json: JsonOption = False) -> None:
    """List the shipped recipes and the models they are recognised by."""
    from .recipe import load_recipe, shipped_recipes

    loaded = {name: load_recipe(name) for name in sorted(shipped_recipes())}
    if as_json:
        print(json.dumps({name: recipe.description for name, recipe in loaded.items()}, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    libraries = match_keys()
    for column in ("recipe", "description", *libraries):
        table.add_column(column, overflow="fold")
    for name, recipe in loaded.items():
        table.add_row(name, recipe.description, *(" ".join(recipe.match[library]) for library in libraries))
    out.print(table)


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="a shipped recipe's name")]) -> None:
    """Print a shipped recipe's YAML, to read or to start your own from."""
    from .recipe import shipped_recipes

    shipped = shipped_recipes()
    if name not in shipped:
        raise SurgeryError(
            f"no shipped recipe is called {name!r}; known: {', '.join(sorted(shipped))}{near_misses(name, shipped)}"
        )
    print(shipped[name].read_text(encoding="utf-8"), end="")


@recipes_app.command("check")
def check_recipe(
    file: Annotated[str, typer.Argument(help="a YAML file, or a shipped recipe's name")],
    spec: Annotated[str | None, typer.Argument(metavar="[SPEC]", help="a model to try it on")] = None,
) -> None:
    """Check a recipe; a fault is told with its line. With a model: how many layers each rule means and decides."""
    from .planning import plan as make_plan
    from .planning import why_nothing
    from .recipe import load_recipe
    from .recipe.authoring import rule_matches

    recipe = load_recipe(_recipe(file))
    rules = f"{len(recipe.keep)} keep and {len(recipe.swap)} swap rules, inherited ones included"
    if spec is None:
        _say(f"{file}: well-formed; {rules}. Whether they fit a model shows on one: recipes check {file} SPEC")
        return
    with _working(f"looking at {spec}", quiet=False):
        made = make_plan(build(spec, pretrained=False)[0], recipe)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("rule", "entry", "conditions", "means", "decides"):
        table.add_column(column, overflow="fold", justify="right" if column in ("means", "decides") else "left")
    idle = []
    for rule, means, decides in rule_matches(recipe, made):
        table.add_row(rule.label, rule.key, rule.where.describe(), str(means), str(decides))
        idle += [rule.key] * (decides == 0)
    out.print(table)
    if not made.swaps:
        raise SurgeryError(f"{file} swaps nothing in {spec}: {why_nothing(made)}")
    _say(f"{file}: fits {spec}, {len(made.swaps)} of {len(made.sites)} sites swapped; {rules}")
    if idle:
        _say(
            f"{', '.join(idle)}: decides nothing here, because no site has it or an earlier reason decided all it means"
        )


@recipes_app.command("new")
def new_recipe(
    spec: Spec,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="file to write")] = None,
) -> None:
    """Write a first recipe for a model, from what one look at it shows."""
    from .discovery import sites
    from .recipe.authoring import draft
    from .saving.atomic import write_text

    if output is not None and output.exists():
        raise SurgeryError(f"{output} exists; give a new file")
    with _working(f"looking at {spec}", quiet=False):
        model, _ = build(spec, pretrained=False)
        text = draft(model, sites(model))
    if output is None:
        print(text, end="")
        return
    try:
        write_text(output, text)
    except OSError as error:
        raise SurgeryError(f"{output} cannot be written: {error.strerror or error}") from None
    _say(f"written to {output}; try it: fdsurgery plan {spec} --recipe {output}")


@recipes_app.command("explain")
def explain_site(
    spec: Spec,
    site: Annotated[str, typer.Option("--site", "-s", metavar="NAME", help="a layer's fully qualified name")],
    recipe: RecipeOption = "auto",
) -> None:
    """Tell why one layer is swapped or kept, rule by rule."""
    from .planning import plan as make_plan
    from .recipe import detect_recipe, load_recipe
    from .recipe.authoring import explain

    with _working(f"looking at {spec}", quiet=False):
        model, _ = build(spec, pretrained=False)
        chosen = load_recipe(detect_recipe(model)[0] if recipe == "auto" else _recipe(recipe))
        made = make_plan(model, chosen)
    found = {name: decision for decision in made.decisions for name in (decision.site.name, *decision.site.aliases)}
    if site not in found:
        raise SurgeryError(f"{spec} has no convolution or linear layer {site!r}{near_misses(site, found)}")
    decision = found[site]
    _say(f"{site}: {kind_of(decision.site)}, {shape_of(decision.site)}, in a {decision.site.parent_class or 'model'}")
    if decision.site.obstacle is not None:
        _say(f"it cannot be swapped: {decision.site.obstacle}")
    elif decision.site.caution is not None:
        _say(f"it is swapped only by a rule that says `anyway: true`: {decision.site.caution}")
    for verdict in explain(chosen, decision):
        if verdict.misses:
            said = "no: " + ", ".join(f"{key} is {has}" for key, has in verdict.misses.items())
        else:
            said = "yes, and decides" if verdict.decides else "yes, but an earlier reason decided"
        _say(f"{verdict.rule.label} {verdict.rule.key} ({verdict.rule.where.describe()}): {said}")
    _say(f"so it is {f'swapped by {decision.rule}' if decision.swap else f'kept: {decision.reason}'}")


@recipes_app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of recipes, by which editors complete and check them."""
    from .recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=1))


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="folder for the picture")] = Path(
        "fdsurgery-demo"
    ),
    steps: Annotated[int, typer.Option(min=1, help="steps of fine-tuning for either model")] = 150,
    seed: Annotated[int, typer.Option(help="seed of all random numbers")] = 0,
) -> None:
    """Train a small net to find handwriting on photographs, convert it, fine-tune both: two minutes on two cores."""
    from .demo import run

    run(output, steps=steps, seed=seed, console=out)


def main() -> None:
    """Entry point of the `fdsurgery` command."""
    app()


def _settings(pairs: list[str] | None) -> dict[str, Any]:
    """`KEY=VALUE` pairs, values read as YAML."""
    from .recipe.yaml_source import parse_yaml

    settings = {}
    for pair in pairs or []:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise SurgeryError(f"--set takes KEY=VALUE, e.g. kernel_num=16, not {pair!r}")
        settings[key] = parse_yaml(value, f"--set {key}").data if value.strip() else None
    return settings


def _recipe(text: str) -> str | Path:
    """A name or a path; a file in the current folder needs no `./`."""
    return Path(text) if os.sep in text or text.endswith((".yaml", ".yml")) else text


def _say(text: str) -> None:
    """Print a sentence without line breaks but its own."""
    out.print(text, highlight=False, soft_wrap=True)


def _working(what: str, *, quiet: bool) -> Any:
    """A spinner on stderr, so that stdout holds the result alone."""
    return _console(stderr=True, quiet=quiet).status(Text(f"{what} ..."))


if __name__ == "__main__":
    main()
