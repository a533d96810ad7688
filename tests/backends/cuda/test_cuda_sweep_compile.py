"""What the CUDA sweep becomes on each architecture, without a GPU."""

import re
import subprocess

import pytest

from benchmarks.compiled import cuda_compile

BINARY = cuda_compile.extension()
pytestmark = [
    pytest.mark.skipif(BINARY is None, reason="the CUDA extension was not built: there was no nvcc"),
    pytest.mark.skipif(cuda_compile.cuobjdump() is None, reason="there is no cuobjdump, which Triton brings along"),
]
KERNELS = r"^sweep_(mma|wgmma) TakesStatistics forward_kl$"
GOOD = dict.fromkeys(cuda_compile.INSTRUCTIONS, 1) | {"stack": 0, "local": 0}


def test_sweep_has_the_matrix_instructions_and_copies_of_its_architecture():
    made = {(row["kernel"].split()[0], row["target"]): row for row in cuda_compile.table(BINARY, KERNELS)}
    assert set(made) == {(kernel, target) for kernel in ("sweep_mma", "sweep_wgmma") for target in cuda_compile.TARGETS}
    assert not [words for row in made.values() if (words := cuda_compile.faults(row))]
    wgmma = made["sweep_wgmma", "sm_90a"]
    # Four to each of two models' products and two kinds of elements, and no other kind of product beside them.
    assert (wgmma["wgmma"], wgmma["mma"]) == (16, 0)
    assert all(made["sweep_mma", target]["wgmma"] == 0 for target in cuda_compile.TARGETS)
    assert all(row["registers"] <= 255 for row in made.values())


def test_products_of_wgmma_are_not_waited_for_one_by_one():
    """Where the assembler cannot follow which registers a product is on its way to, it waits after each."""
    (name,) = (
        name
        for target, name in cuda_compile.resources(BINARY)
        if target == "sm_90a" and re.search(KERNELS, short(name)) and "wgmma" in name
    )
    command = [cuda_compile.cuobjdump(), "-sass", "-arch", "sm_90a", "-fun", name, BINARY]
    code = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # One fence before four products; two waits in the loop over a dimension and behind it.
    assert len(re.findall(r"\bHGMMA\b", code)) == 4 * len(re.findall(r"\bWARPGROUP\.ARRIVE\b", code))
    assert len(re.findall(r"\bWARPGROUP\.DEPBAR\b", code)) <= 2 * len(re.findall(r"\bWARPGROUP\.ARRIVE\b", code))


def short(name):
    return cuda_compile.short(name)


@pytest.mark.parametrize("kernel, target", [("sweep_mma", "sm_80"), ("sweep_mma", "sm_100"), ("sweep_wgmma", "sm_90a")])
def test_lack_of_what_was_promised_is_found(kernel, target):
    row = GOOD | {"kernel": f"{kernel} TakesTotals forward_kl", "target": target}
    promised = ("mma", "ldmatrix", "copies_128") if kernel == "sweep_mma" else ("wgmma", "tma_loads", "mbarriers", "register_moves")
    assert cuda_compile.faults(row) == []
    for name in promised:
        assert name in " ".join(cuda_compile.faults(row | {name: 0}))
