"""The README's table and the study's files say the same."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

from memdec.decoders.study.plan import Plan
from memdec.decoders.study.report import markdown
from memdec.decoders.study.scores import METHODS

RESULTS = json.loads((ROOT / "docs" / "evaluation" / "results.json").read_text())


def test_the_readmes_table_is_the_studys() -> None:
    """Every perplexity beside base S."""
    rows = {r["domain"]: r["methods"] for r in RESULTS["results"] if r["base"] == "S"}
    section = (ROOT / "README.md").read_text().split("## What is measured so far")[1].split("\n## ")[0]
    lines = [[c.strip(" *") for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    assert lines[0][1:] == list(METHODS.values())
    found = {line[0]: line[1:] for line in lines[2:]}
    assert found == {d: [f"{methods[m]['perplexity']:.1f}" if m in methods else "" for m in METHODS] for d, methods in rows.items()}


@pytest.mark.parametrize("folder", [".", "M"])
def test_the_page_is_what_the_results_say(folder: str) -> None:
    """Nobody edited the table by hand."""
    page = ROOT / "docs" / "evaluation" / folder
    assert (page / "table.md").read_text() == markdown(json.loads((page / "results.json").read_text()))


def test_the_larger_bases_table_is_the_studys() -> None:
    """Every perplexity beside base M."""
    results = json.loads((ROOT / "docs" / "evaluation" / "M" / "results.json").read_text())["results"]
    section = (ROOT / "docs" / "evaluation" / "README.md").read_text().split("## Beside a larger base")[1].split("\n## ")[0]
    for row in results:
        methods = row["methods"]
        cells = [f"{methods[m]['perplexity']:.1f}" if m in methods else "" for m in METHODS]
        assert f"| {row['domain']} | {' | '.join(cells)} |" in section.replace("*", "")


def test_the_study_description_is_well_formed(tmp_path: Path) -> None:
    """Its keys are known, its domains are the table's; the corpora and base M are not part of the repository."""
    text = re.sub(r"\[bases\.M\].*?\n\n", "", (ROOT / "docs" / "study.toml").read_text(), flags=re.S)
    text = re.sub(r'"\.\./corpora/\w+"', f'"{ROOT}/docs"', text)  # any folder with text in it
    (tmp_path / "study.toml").write_text(text.replace('"../', f'"{ROOT}/'))
    plan = Plan.load(tmp_path / "study.toml")
    assert [d.name for d in plan.domains] == list(dict.fromkeys(r["domain"] for r in RESULTS["results"]))
