"""The figure of the rooms in docs/pages/architecture.md is what the imports draw."""

import re
from itertools import product
from pathlib import Path

import grimp

PAGE = Path(__file__).parents[2] / "docs" / "pages" / "architecture.md"


def room(module: str) -> str:
    """`data_prep`, or the part of `hpo_verl` that a module belongs to."""
    first, *rest = module.split(".")
    return first if first == "data_prep" else rest[0] if rest else first


def imported_rooms() -> set[tuple[str, str]]:
    """Who imports whom, without what follows from other arrows."""
    graph = grimp.build_graph("hpo_verl", "data_prep")
    arrows = {
        (room(importer), room(imported))
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
    }
    rooms = {name for arrow in arrows for name in arrow}
    # What stands at the top of the package is in no room.
    rooms -= {"hpo_verl", "child", "errors", "installed", "__main__"}
    reached = {(a, b) for a, b in arrows if a in rooms and b in rooms and a != b}
    for middle, a, b in product(rooms, rooms, rooms):
        if (a, middle) in reached and (middle, b) in reached:
            reached.add((a, b))
    assert not [(a, b) for a, b in reached if (b, a) in reached]
    return {
        (a, b)
        for a, b in reached
        if not any((a, middle) in reached and (middle, b) in reached for middle in rooms)
    }


def test_the_figure_equals_the_imports():
    figure = PAGE.read_text().split("<!-- rooms -->")[1].split("<!-- end -->")[0]
    drawn = set(re.findall(r"^ +(\w+) --> (\w+)$", figure, re.MULTILINE))
    assert drawn == imported_rooms(), "\n".join(
        f"  {a} --> {b}" for a, b in sorted(imported_rooms())
    )
