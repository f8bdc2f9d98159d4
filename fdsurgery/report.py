"""Plans as tables."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from .discovery.site import Site

if TYPE_CHECKING:
    from .planning import Decision, Plan


def plan_table(plan: Plan) -> Table:
    """The decision for every site, and the sum of it in the caption."""
    table = Table(
        caption="\n".join(filter(None, (plan.summary(), plan.rest()))),
        caption_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    table.add_column("site", overflow="fold")
    table.add_column("kind", min_width=9)
    table.add_column("shape", min_width=8)
    table.add_column("decision", no_wrap=True)
    table.add_column("rule or reason", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("multiply-\nadds", justify="right", no_wrap=True)
    for decision in plan.decisions:
        table.add_row(
            decision.site.name,
            kind_of(decision.site),
            shape_of(decision.site),
            f"swap: {decision.operator}" if decision.swap else "keep",
            _why(decision),
            f"+{decision.parameters_added:,}" if decision.swap else "",
            f"+{in_units(decision.multiply_adds_added)}" if decision.swap else "",
            style=None if decision.swap else "dim",
        )
    return table


def _why(decision: Decision) -> str:
    """The rule that swaps a site, or why it is kept and which rule says so."""
    if decision.swap:
        anyway = f"swapped anyway: {decision.site.caution}" if decision.site.caution else ""
        return "; ".join(filter(None, (decision.rule, anyway)))
    return decision.reason + (f" ({decision.rule})" if decision.rule else "")


def kind_of(site: Site) -> str:
    """A site's kind and role: `conv, spatial`; the role alone where it says both."""
    return site.role if site.role == site.kind else f"{site.kind}, {site.role}"


def shape_of(site: Site) -> str:
    """A site's shape in a few characters, e.g. `64→256 3x3 /2 g32`."""
    parts = [f"{site.in_channels}→{site.out_channels}"]
    if site.kind == "conv":
        parts.append("x".join(map(str, site.kernel_size)))
    if site.stride != (1, 1):
        parts.append("/" + "x".join(map(str, sorted(set(site.stride)))))
    if site.groups > 1:
        parts.append(f"g{site.groups}")
    return " ".join(parts)


def in_units(count: int) -> str:
    """A large number in units of 10^6 or 10^9, e.g. `12.30 M` or `4.09 G`."""
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def render(plan: Plan, width: int = 160) -> str:
    """A plan as plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False, emoji=False)
    console.print(plan)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
