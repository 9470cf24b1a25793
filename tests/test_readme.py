"""Links of README and docs lead somewhere; the README's commands exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_links_lead_to_files(path):
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    assert links or path.name != "README.md"
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []


def test_the_commands_of_the_readme_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|^    )make ([\w-]+)", README, re.MULTILINE))
    assert {"repro", "test", "ui"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)
