"""How layers share warehouses: names, places, and what cannot be shared."""

from __future__ import annotations

from typing import Any

import pytest

import fdsurgery
from fdsurgery.operators import get_operator
from fdsurgery.operators.warehouse import Shape, assigned_cells, cells_taken, logits_of, shared_out, stage_of

OPERATOR: Any = get_operator("kernel_warehouse")


def settings_of(**values: Any) -> dict[str, Any]:
    complete: dict[str, Any] = OPERATOR.settings(values)
    return complete


def test_cells_are_assigned_as_the_paper_has_it() -> None:
    assert assigned_cells(5, 3, 1, 99) == [5, 6, 7] and assigned_cells(4, 3, 4, 99) == [4, 8, 12]
    assert cells_taken(3, 4) == 12
    half = [place % 2 == (place // 2) % 2 for place in range(8)]
    expected, following = [], 10
    for filled in half:
        expected.append(following if filled else 50)
        following += filled
    assert assigned_cells(10, 8, 0.5, 50) == expected and cells_taken(8, 0.5) == 4


def test_a_basis_spans_what_is_not_the_layers_own() -> None:
    assert logits_of(9, 100, 2, 1.0) == (100, 0)
    assert logits_of(9, 100, 2, 0.5) == (18, 41) and logits_of(9, 100, 2, 0.01) == (18, 16)
    assert logits_of(9, 18, 2, 0.5) == (18, 0), "a layer alone has nothing to span"


def test_warehouses_by_name_and_by_stage() -> None:
    shapes = [
        Shape("stem", 32, 3, (7, 7)),
        Shape("layer1.0.conv1", 32, 32, (3, 3)),
        Shape("layer1.1.conv1", 64, 32, (1, 1)),
        Shape("layer1.1.dw", 64, 1, (3, 3), 64),
        Shape("body.stages.2.fc", 16, 64, (1, 1)),
    ]
    assert [stage_of(shape) for shape in shapes] == [
        "all, filters of 3 channels",
        "layer1",
        "layer1",
        "layer1, filters of 1 channels",
        "body.stages.2",
    ]
    told = shared_out(shapes, [settings_of()] * 5)
    assert [(its["start"], its["places"], its["cells"], its["cell_shape"]) for its in told] == [
        (0, 49, 49, [32, 3, 1, 1]),
        (0, 9, 11, [32, 32, 1, 1]),
        (9, 2, 11, [32, 32, 1, 1]),
        (0, 9, 9, [64, 1, 1, 1]),
        (0, 1, 1, [16, 64, 1, 1]),
    ]
    named = shared_out(shapes[1:3], [settings_of(warehouse="a", ratio=2), settings_of(warehouse="b")])
    assert [(its["warehouse"], its["cells"], its["first"]) for its in named] == [
        ("a", 18, "layer1.0.conv1"),
        ("b", 1, "layer1.1.conv1"),
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ratio": 1.5}, "a ratio above 1 is a whole number"),
        ({"ratio": 0.3}, "1 over a whole number"),
        ({"ratio": 0}, "greater than 0"),
        ({"ratio": True}, "ratio"),
        ({"warehouse": ""}, "warehouse"),
        ({"warehouse": 3}, "warehouse"),
        ({"norm": "rms"}, "'batch' or 'layer'"),
        ({"reduction": 0.0}, "greater than 0"),
        ({"min_channels": 0}, "greater than or equal to 1"),
        ({"cell_in_ratio": 2.0}, "less than or equal to 1"),
        ({"nonlocal_basis_ratio": 1.5}, "less than or equal to 1"),
        ({"warehouses": "a"}, "did you mean 'warehouse'"),
    ],
)
def test_settings_that_are_wrong(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(fdsurgery.RecipeError, match=said):
        OPERATOR.settings(settings)


def test_layers_that_cannot_share() -> None:
    a, b = Shape("a", 8, 8, (3, 3)), Shape("b", 12, 8, (1, 1))

    def told(match: str, *settings: dict[str, Any], shapes: Any = (a, b)) -> None:
        with pytest.raises(fdsurgery.RecipeError, match=match):
            shared_out(shapes, [settings_of(warehouse="w", **its) for its in settings])

    told("differ in ratio: 1 for 'a', 2 for 'b'", {}, {"ratio": 2})
    told("3x3 of 'a' and 1x1 of 'b'", *[{"spatial_partition": False}] * 2)
    told("do not tile 'a'", *[{"cell_out_ratio": 0.75}] * 2)
    told(
        "1 over the ratio must divide",
        *[{"ratio": 0.5}] * 2,
        shapes=(Shape("a", 8, 8, (3, 3)), Shape("b", 8, 8, (1, 1))),
    )
    told("few channels in common", {}, {}, shapes=(Shape("a", 1024, 1, (7, 7)), Shape("b", 1024, 1024, (3, 3))))
