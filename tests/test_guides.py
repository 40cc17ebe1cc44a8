"""Everything that the guides show runs, in the order in which it is read."""

import re

import pytest

from tests.guides import ROOT, blocks, run_block

GUIDES = ("getting-started", "your-own-data", "your-own-network", "kernels-and-backends", "troubleshooting")


@pytest.mark.long
@pytest.mark.parametrize("guide", GUIDES)
def test_the_blocks_of_a_guide_run(guide, tmp_path):
    found = blocks((ROOT / "docs" / f"{guide}.md").read_text(), "python", "sh")
    assert found
    for language, code in found:
        done = run_block(language, code, tmp_path)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("file", [*(f"docs/{guide}.md" for guide in GUIDES), "README.md", "examples/README.md"])
def test_links_lead_somewhere(file):
    text = (ROOT / file).read_text()
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    assert targets and all(((ROOT / file).parent / target).exists() for target in targets), targets


def test_a_block_that_fails_is_seen(tmp_path):
    assert run_block("sh", "false\ntrue\n", tmp_path).returncode != 0
    assert run_block("python", "raise SystemExit(3)\n", tmp_path).returncode == 3
