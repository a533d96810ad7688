"""Every Python block of the README runs, and every command of it exists."""

import pkgutil
import re

import pytest
from document_blocks import ROOT, run_python_blocks


def test_readme_python_blocks_run(capsys):
    namespace = run_python_blocks("README.md", at_least=4)
    assert namespace["student_head"].grad.abs().sum() > 0


def test_readme_names_the_commands_it_promises():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\w+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"README says `make {target}`"


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))), "examples", "benchmarks/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_names_of_the_package_in_pages_exist(page):
    path = ROOT / page
    texts = [path.read_text(encoding="utf-8")] if path.is_file() else [part.read_text() for part in path.glob("*.py")]
    for name in {found for text in texts for found in re.findall(r"\bdistill_kernels(?:\.[A-Za-z_]\w*)+", text)}:
        pkgutil.resolve_name(name)


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md")] + ["Makefile", "tests/README.md"])
def test_files_that_pages_name_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    folders = "benchmarks|csrc|distill_kernels|docs|examples|python|tests"
    for name in set(re.findall(rf"(?<![\w/.])(?:{folders})(?:/[\w.-]+)+\.(?:py|csv|png|inc|cuh|cu|h|cpp|md|ini)\b", text)):
        assert (ROOT / name).exists(), f"{page} names {name}"
