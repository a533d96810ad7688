"""Every Python block of the README runs, and every command of it exists."""

import re

from document_blocks import ROOT, run_python_blocks


def test_readme_python_blocks_run(capsys):
    namespace = run_python_blocks("README.md", at_least=4)
    assert namespace["student_head"].grad.abs().sum() > 0


def test_readme_names_the_commands_it_promises():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make (\w+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"README says `make {target}`"
