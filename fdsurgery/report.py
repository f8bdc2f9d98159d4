"""Decisions as a table, and numbers and shapes in few characters."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .discovery.site import Site

if TYPE_CHECKING:  # rich is imported where something is shown, not with the library
    from rich.console import RenderableType
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """A site in the table of a plan."""

    site: Site
    decision: str
    """`keep`, or `swap: OPERATOR`."""
    why: str
    """The rule or the reason, in words."""
    parameters: str = ""
    multiply_adds: str = ""
    dim: bool = False


def table(rows: Sequence[Row], caption: str) -> Table:
    """One line a site, and a caption below."""
    from rich.table import Table

    made = Table(caption=caption, caption_justify="left", box=None, pad_edge=False, header_style="bold")
    made.add_column("site", overflow="fold")
    made.add_column("kind", min_width=9)
    made.add_column("shape", min_width=8)
    made.add_column("decision", no_wrap=True)
    made.add_column("rule or reason", overflow="fold")
    made.add_column("parameters", justify="right", no_wrap=True)
    made.add_column("multiply-\nadds", justify="right", no_wrap=True)
    for row in rows:
        cells = (row.site.name, kind_of(row.site), shape_of(row.site), row.decision, row.why)
        made.add_row(*cells, row.parameters, row.multiply_adds, style="dim" if row.dim else None)
    return made


def kind_of(site: Site) -> str:
    """A site's kind and role: `conv, spatial`; the role alone where it says both."""
    return site.role if site.role == site.kind else f"{site.kind}, {site.role}"


def shape_of(site: Site) -> str:
    """A site's shape in a few characters, e.g. `64→256 3x3 /2 g32`."""
    parts = [f"{site.in_channels}→{site.out_channels}"]
    if site.convolves:
        parts.append("x".join(map(str, site.kernel_size)))
    if site.stride != (1, 1):
        parts.append("/" + "x".join(map(str, sorted(set(site.stride)))))
    if site.groups > 1:
        parts.append(f"g{site.groups}")
    return " ".join(parts)


def in_units(count: int) -> str:
    """A large number in units of 10^6 or 10^9, e.g. `12.30 M` or `4.09 G`."""
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.2f} M"


def render(shown: RenderableType, width: int = 160) -> str:
    """A table, or what has one, as plain text."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False, emoji=False)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
