"""The table of architectures that is committed, and the page about it: what they say is what is found."""

import csv

import pytest
import transformers
from document_blocks import run_python_blocks
from thinned import some

from benchmarks.models.architectures import RESULTS, examine, model_types
from distill_kernels.api.models import architectures

THIN = ["aria_text", "axk2", "blenderbot", "bamba", "doge", "dory", "gemma2", "llama4_text", "minicpm3", "xlm-roberta"]


@pytest.fixture(scope="module")
def table():
    with RESULTS.open(newline="") as file:
        return {row["model_type"]: row for row in csv.DictReader(file)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", some(model_types(), [name for name in THIN if name in model_types()]))
def test_architectures_are_what_the_table_says(table, model_type):
    """With another transformers than the table's, no architecture may be wrong."""
    found = examine(model_type)
    assert found.outcome != "wrong", found
    if table[model_type]["transformers"] == transformers.__version__:
        for name in ("outcome", "logits", "hidden", "auxiliary", "packed_sdpa", "packed_eager"):
            assert getattr(found, name) == table[model_type][name], name


def test_most_architectures_of_the_table_are_right(table):
    outcomes = [row["outcome"] for row in table.values()]
    assert outcomes.count("right") > 180
    assert outcomes.count("refused") <= 2
    assert "wrong" not in outcomes
    assert all(row["reason"] for row in table.values() if row["outcome"] != "right")


def test_the_page_about_models_runs(monkeypatch):
    monkeypatch.setattr(architectures, "_KNOWN", dict(architectures._KNOWN))
    ran = run_python_blocks("docs/models.md", at_least=2)
    assert ran["learned"].hidden.shape == (2, 16, 32)
    assert ran["labels"].shape == (2, 16)
