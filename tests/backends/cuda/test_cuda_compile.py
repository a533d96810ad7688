"""What the CUDA kernels become on each architecture, without a GPU: machine code that does not spill and has the instructions meant."""

import importlib
import os
import shutil
import subprocess

import pytest

from benchmarks import record
from benchmarks.compiled import cuda_compile

BINARY = cuda_compile.extension()
built = pytest.mark.skipif(BINARY is None, reason="the CUDA extension was not built: there was no nvcc")
readable = pytest.mark.skipif(cuda_compile.cuobjdump() is None, reason="there is no cuobjdump, which Triton brings along")
NUMBERS = ("registers", "stack", "shared", "dynamic_shared", *cuda_compile.INSTRUCTIONS)
# Whose machine code is taken apart in every run: a few seconds of the minute that all of it takes.
FEW = r"^row_kernel (forward_kl|alpha_beta)|^(gather|scatter)_"
GOOD = {
    "target": "sm_90a", "kernel": "row_kernel forward_kl", "registers": 96, "stack": 0, "shared": 0, "dynamic_shared": 1456,
    **dict.fromkeys(cuda_compile.INSTRUCTIONS, 0), "loads_128": 4, "stores_128": 2, "shared_128": 3, "cluster_barriers": 4,
}  # fmt: skip


def known():
    return {key: row | {name: int(row[name]) for name in NUMBERS} for key, row in cuda_compile.committed().items()}


@built
@readable
def test_kernels_of_the_binary_are_those_of_the_committed_table_and_do_not_spill():
    found = {(target, cuda_compile.short(name)): row for (target, name), row in cuda_compile.resources(BINARY).items()}
    table = known()
    assert set(found) == set(table)
    for key, row in found.items():
        assert row["stack"] == 0, key
        assert abs(row["registers"] - table[key]["registers"]) <= cuda_compile.REGISTERS_APART, key


@pytest.mark.exhaustive
@built
@readable
def test_machine_code_has_the_instructions_meant():
    made = cuda_compile.table(BINARY, FEW)
    assert {row["target"] for row in made} == set(cuda_compile.TARGETS) and len(made) == 3 * 7
    assert not cuda_compile.complaints(made, cuda_compile.committed())


@built
@readable
def test_binary_serves_later_chips_by_ptx_of_the_last():
    def listed(kind):
        return subprocess.run([cuda_compile.cuobjdump(), f"--list-{kind}", BINARY], check=True, capture_output=True, text=True).stdout

    assert ".sm_100.ptx" in listed("ptx") and ".sm_80.ptx" not in listed("ptx")
    assert all(f".{target}.cubin" in listed("elf") for target in cuda_compile.TARGETS)


def cuda_is_wanted():
    """As setup.py has it."""
    home, asked = os.environ.get("CUDA_HOME"), os.environ.get("DISTILL_KERNELS_CUDA")
    places = [f"{home}/bin/nvcc"] * bool(home) + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return asked == "required" or (asked != "0" and any(map(shutil.which, places)))


@pytest.mark.skipif(not cuda_is_wanted(), reason="there is no nvcc, or it was not to be used: the CUDA extension is not built here")
def test_where_there_is_nvcc_the_extension_was_built_and_imports():
    assert importlib.import_module("distill_kernels._cuda").divergences


def test_committed_table_has_every_kernel_on_every_target_and_no_fault():
    table = known()
    assert not cuda_compile.complaints(list(table.values()), None)
    kernels = {kernel for _, kernel in table}
    assert set(table) == {(target, kernel) for target in cuda_compile.TARGETS for kernel in kernels}
    assert {"row_kernel forward_kl", "row_kernel no_divergence", "gather_columns_kernel", "scatter_rows_kernel float4"} <= kernels
    assert max(row["registers"] for row in table.values()) <= 255


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, None),
        ({"stack": 4136}, "4136 bytes of stack"),
        ({"local": 2}, "2 instructions on local memory"),
        ({"loads_128": 0}, "has no loads_128"),
        ({"stores_128": 0}, "has no stores_128"),
        ({"cluster_barriers": 0}, "has no cluster_barriers"),
        ({"cluster_barriers": 0, "target": "sm_80"}, None),
        ({"kernel": "scatter_rows_kernel float4", "loads_128": 0}, "has no loads_128"),
    ],
)
def test_fault_is_found(change, words):
    found = cuda_compile.faults(GOOD | change)
    assert (found == []) if words is None else words in " ".join(found)


def test_what_differs_from_the_committed_table_is_told():
    committed = {name: str(value) for name, value in GOOD.items()}
    key = tuple(GOOD[column] for column in cuda_compile.KEY)
    assert cuda_compile.complaints([GOOD], {key: committed}) == []
    (words,) = cuda_compile.complaints([GOOD | {"registers": 130}], {key: committed})
    assert words == "sm_90a, row_kernel forward_kl: registers were 96, are 130"
    (words,) = cuda_compile.complaints([GOOD | {"dynamic_shared": 94208}], {key: committed})
    assert "shared memory were 1456, are 94208" in words
    assert "mma were 0, are 3" in cuda_compile.complaints([GOOD | {"mma": 3}], {key: committed})[0]
    assert "not in the committed table" in cuda_compile.complaints([GOOD | {"kernel": "another_kernel"}], {key: committed})[0]


def test_names_of_kernels_are_read_from_mangled_ones():
    assert cuda_compile.short("_ZN15distill_kernels4cuda10row_kernelINS0_10forward_klEEEvNS0_4LossENS0_4RowsET_") == "row_kernel forward_kl"
    inner = "_ZN15distill_kernels4cuda43_GLOBAL__N__7d094b31_10_columns_cu_81bf3d18"
    assert cuda_compile.short(inner + "19scatter_rows_kernelI6float4EEvPfPKllPKf") == "scatter_rows_kernel float4"
    assert cuda_compile.short(inner + "19scatter_rows_kernelIfEEvPfPKllPKf") == "scatter_rows_kernel float"
    assert cuda_compile.short(inner + "21gather_columns_kernelENS0_13GatherColumnsE") == "gather_columns_kernel"


def test_results_have_one_row_to_a_key():
    rows = record.read(cuda_compile.NAME)
    assert len({tuple(row[column] for column in cuda_compile.KEY) for row in rows}) == len(rows)
