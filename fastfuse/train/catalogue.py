"""What methods there are, with what each needs, deploys and has recipes for."""

import sys
from typing import Any

from fastfuse import config
from fastfuse.methods import METHODS

# Columns of a terminal from which on the table's words stay whole.
_TABLE = 140


def catalogue() -> list[dict[str, Any]]:
    """One entry per method: name, summary, students (minimum, maximum, default), teachers, deploys, recipes."""
    recipes = {name: config.from_recipe(name).method for name in config.recipes()}
    return [
        {
            "name": name,
            "summary": (sys.modules[method.__module__].__doc__ or "").strip().splitlines()[0].rstrip("."),
            "students": {
                "minimum": method.minimum_students,
                "maximum": method.maximum_students,
                "default": method.default_students,
            }
            if method.has_students
            else dict.fromkeys(("minimum", "maximum", "default"), 0),
            "teachers": method.teacher_count,
            "beside": method.extra_network,
            "deploys": method.deployed,
            "recipes": [recipe for recipe, own in recipes.items() if own == name],
        }
        for name, method in METHODS.items()
    ]


def needs(entry: dict[str, Any]) -> str:
    """What a method needs, in words: students, the network trained beside them, frozen teachers."""
    students, parts = entry["students"], []
    if students["maximum"] != students["minimum"]:
        parts.append(f"{students['minimum']} or more students")
    elif students["minimum"]:
        parts.append(_counted(students["minimum"], "student"))
    if entry["beside"]:
        parts[-1] += f" and a {entry['beside']}"
    if entry["teachers"]:
        parts.append(_counted(entry["teachers"], "frozen teacher"))
    return ", ".join(parts)


def print_catalogue(found: list[dict[str, Any]]) -> None:
    """Print what `catalogue` found: a table, or where the terminal is too narrow for one a paragraph per method."""
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
    table = Table("method", "what it is", "needs", "deploys", "recipes")
    for column in (0, 3):
        table.columns[column].no_wrap = True
    for entry in found:
        recipes = ", ".join(entry["recipes"])
        table.add_row(entry["name"], escape(entry["summary"]), needs(entry), entry["deploys"], recipes)
        if console.width < _TABLE:
            text = f"{escape(entry['summary'])}; needs {needs(entry)}; deploys {entry['deploys']}"
            console.print(f"[bold]{entry['name']}[/bold]", highlight=False)
            console.print(Padding(text + (f"; recipes: {recipes}" if recipes else ""), (0, 0, 0, 2)), highlight=False)
    if console.width >= _TABLE:
        console.print(table)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number > 1 else "")
