"""Pages on the command line, loops, on-policy and sequence distillation: blocks run, commands parse, files are there."""

import re
import shlex

import pytest
from document_blocks import ROOT, run_python_blocks

from distill_kernels.api import command_line

PAGES = ("docs/command-line.md", "docs/loops.md", "docs/on-policy.md", "docs/sequence-distillation.md")


@pytest.mark.parametrize("page, at_least", [("docs/loops.md", 3), ("docs/on-policy.md", 5), ("docs/sequence-distillation.md", 3)])
def test_python_blocks_run(page, at_least):
    pytest.importorskip("transformers")
    namespace = run_python_blocks(page, at_least=at_least)
    gradients = [parameter.grad for parameter in namespace["student"].parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients) and gradients[0].any()


def commands(page):
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def test_commands_of_the_page_parse():
    lines = [line[1:] for line in commands("docs/command-line.md") if line[0] == "distill-kernels"]
    assert {line[0] for line in lines} == {"plan", "bench", "train", "cache"}
    for line in lines:
        command_line.parser().parse_args(line)


def test_the_page_names_every_command():
    text = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert named == list(command_line.parser()._subparsers._group_actions[0].choices)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    linked = [(ROOT / page).parent / target for target in re.findall(r"\]\(([^)#]+)\)", text)]
    run = [ROOT / word for line in commands(page) for word in line if word.endswith(".py")]
    assert linked + run and all(path.resolve().is_file() for path in linked + run)
