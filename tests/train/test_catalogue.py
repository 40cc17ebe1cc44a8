"""`fastfuse methods`: every method with what it needs, deploys and has recipes for."""

import json

from fastfuse import cli
from fastfuse.config import recipes
from fastfuse.methods import METHODS


def test_all_methods_and_recipes_are_listed(capsys):
    assert cli.main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found] == list(METHODS)
    assert sorted(recipe for entry in found for recipe in entry["recipes"]) == recipes()
    by_name = {entry["name"]: entry for entry in found}
    assert by_name["ffsd"]["beside"] == "leader" and by_name["ffsd"]["deploys"] == "leader"
    assert by_name["feed-parallel"]["teachers"] == 5
    assert by_name["kd"]["students"] == {"minimum": 1, "maximum": 1, "default": 1}
    assert by_name["paraphraser"]["students"] == {"minimum": 0, "maximum": 0, "default": 0}
    assert all(entry["summary"] for entry in found)


def test_the_table_says_what_each_needs(capsys):
    assert cli.main(["methods"]) == 0
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("│ ")}
    assert "2 or more students and a leader" in lines["ffsd"]
    needed = {name: line.split("│")[3].strip() for name, line in lines.items() if name in METHODS}
    assert needed["paraphraser"] == "1 frozen teacher"  # it makes no student
    assert needed["dfa-search"] == "1 student, 1 frozen teacher"  # whose network it searches for
    assert needed["ffcl"] == "1 or more students and a teacher"
    assert "1 student, 5 frozen teachers" in lines["feed-parallel"]
    assert set(METHODS) <= set(lines)
