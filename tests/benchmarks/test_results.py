"""What benchmarks leave behind: one row to a key, in what `record.write` writes and in what is committed."""

import csv

import pytest

from benchmarks import record

KEYS = {
    "architectures": ("model_type",),
    "cache_errors": ("kind", "dtype"),
    "columns": ("case", "dtype", "temperature", "variant"),
    "columns_break_even": ("tokens", "vocabulary", "dim", "dtype", "variant"),
    "columns_chunk": ("dtype", "chunk_tokens"),
    "distil_curves": ("column_fraction", "seed", "step"),
    "workspace": ("case", "dtype", "workspace_mib"),
}


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_later_measurement_replaces_the_one_of_its_key(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    for seconds in (1.5, 2.5):
        rows = [{"case": "a", "temperature": 1.0, "variant": 0.08, "seconds": seconds}]
        path = record.write("some", rows, ("case", "temperature", "variant"))
    record.write("some", [{"case": "b", "temperature": 1.0, "variant": 0.08, "seconds": 1.0}], ("case", "temperature", "variant"))
    assert [(row["case"], row["seconds"]) for row in read(path)] == [("a", "2.5"), ("b", "1")]


@pytest.mark.parametrize("name", KEYS)
def test_committed_results_have_one_row_to_a_key(name):
    keys = [tuple(row[column] for column in KEYS[name]) for row in read(record.RESULTS / f"{name}.csv")]
    assert keys and len(set(keys)) == len(keys)
