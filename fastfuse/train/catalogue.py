"""What methods there are, with what each needs, deploys and has recipes for."""

import sys
from typing import Any

from fastfuse import config
from fastfuse.methods import METHODS


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
            },
            "teachers": method.teacher_count,
            "beside": method.extra_network,
            "deploys": method.deployed,
            "recipes": [recipe for recipe, own in recipes.items() if own == name],
        }
        for name, method in METHODS.items()
    ]


def needs(entry: dict[str, Any]) -> str:
    """What a method needs, in words: students, the network trained beside them, frozen teachers."""
    students = entry["students"]
    if students["maximum"] == students["minimum"]:
        text = f"{students['minimum']} student" + ("s" if students["minimum"] > 1 else "")
    else:
        text = f"{students['minimum']} or more students"
    if entry["beside"]:
        text += f" and a {entry['beside']}"
    if entry["teachers"]:
        text += f", {entry['teachers']} frozen teacher" + ("s" if entry["teachers"] > 1 else "")
    return text
