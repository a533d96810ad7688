"""What the Triton kernels become on each target, without a GPU: machine code that does not spill, bytes and flops as documented."""

import csv
import dataclasses
import math

import pytest
from thinned import some

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)

from benchmarks import record
from benchmarks.compiled import triton_ahead, triton_compile, triton_traffic
from distill_kernels.backends.triton import quantised_sweep, sweep
from distill_kernels.estimators.quantised import KINDS

GOOD = {
    "target": "sm_90", "kernel": "sweep_kernel", "variant": "forward_kl: statistics", "dtype": "bfloat16", "configuration": "a tile",
    "registers": 255, "spill_stores": 0, "spill_loads": 0, "shared": 98328, "warps": 8, "matrix": "wgmma", "promised_matrix": "wgmma",
    "tma_loads": 12, "promised_tma": 1, "load_bytes": 8, "triton": "3.7.1",
}  # fmt: skip
COMMITTED = {name: str(value) for name, value in GOOD.items()}
KEY = tuple(COMMITTED[column] for column in triton_compile.KEY)


# A process for each target compiles its kernels, a quarter of a minute.
@pytest.mark.parametrize("target", some(list(triton_ahead.TARGETS), ["sm_90"]))
def test_kernels_compile_as_committed(target):
    made = triton_ahead.rows_of("benchmarks.compiled.triton_compile", "--target", target, "--check")
    wanted = {"statistics_kernel", "totals_kernel", "gradient_kernel", "sweep_kernel"}
    assert {row["target"] for row in made} == {target}
    assert {row["kernel"] for row in made} >= ({"quantised_sweep_kernel"} if target in triton_ahead.CONFIGURED_AS else wanted)
    assert not triton_compile.complaints(made, triton_compile.committed())


def test_committed_table_has_every_configuration_and_no_fault():
    rows = list(triton_compile.committed(release=None).values())
    assert {row["target"] for row in rows if row["triton"] == "3.6.0"} == {"sm_90"}  # what the GPU machines of torch 2.11 have
    numbers = ("spill_stores", "spill_loads", "tma_loads", "promised_tma", "shared")
    assert not [words for row in rows if (words := triton_compile.faults(row | {name: int(row[name]) for name in numbers}))]
    named = {(row["triton"], row["target"], row["configuration"]) for row in rows}
    for key, tiles in sweep.CONFIGURATIONS.items():
        for tile in tiles if key[0] in triton_ahead.TARGETS else ():
            reads = "descriptors" if tile.descriptors else "pointers"
            text = f"{tile.rows} x {tile.entries} x {tile.depth}, {tile.warps} warps, {tile.stages} stages, {reads}"
            assert ("3.7.1", key[0], text) in named and (key[0] != "sm_90" or ("3.6.0", key[0], text) in named)


def test_committed_table_has_every_quantised_configuration_by_the_matrix_instructions_of_8_bits():
    rows = [row for row in triton_compile.committed("3.7.1").values() if row["kernel"] == "quantised_sweep_kernel"]
    made = {(row["target"], row["dtype"], row["configuration"]): row for row in rows}
    for (architecture, kind), tiles in ((key, tiles) for key, tiles in quantised_sweep.CONFIGURATIONS.items() if key != "interpreter"):
        target = "sm_89" if (architecture, kind) == ("sm_80", "fp8") else architecture
        for tile in tiles:
            reads = "descriptors" if tile.descriptors else "pointers"
            text = f"{tile.rows} x {tile.entries} x {tile.depth}, {tile.warps} warps, {tile.stages} stages, {reads}"
            row = made[target, str(KINDS[kind][0]).removeprefix("torch."), text]
            wanted = {"sm_90": "wgmma", "sm_100": "tcgen05" if kind == "fp8" else "mma.sync", "gfx942": "mfma"}
            assert row["matrix"] == wanted.get(target, "mma.sync") and bool(int(row["tma_loads"])) == tile.descriptors


@pytest.mark.parametrize(
    "change, word",
    [
        ({"spill_stores": 4}, "spills"),
        ({"spill_loads": 4}, "spills"),
        ({"spill_loads": 97, "triton": "3.6.0"}, "spills"),
        ({"matrix": "mma.sync"}, "mma.sync, not by wgmma"),
        ({"target": "sm_100", "matrix": "fma", "promised_matrix": "tcgen05"}, "fma, not by tcgen05"),
        ({"tma_loads": 0}, "no TMA load"),
        ({"shared": 227 * 1024 + 1}, "shared memory"),
        ({"target": "sm_80", "shared": 100 * 1024}, "shared memory"),
    ],
)
def test_fault_is_found(change, word):
    assert not triton_compile.faults(GOOD) and not triton_compile.faults(GOOD | {"spill_loads": 96, "triton": "3.6.0"})
    (fault,) = triton_compile.faults(GOOD | change)
    assert word in fault


@pytest.mark.parametrize("change", [{"registers": 200}, {"matrix": "fma"}, {"load_bytes": 4}, {"tma_loads": 0}, {"warps": 4}], ids=str)
def test_difference_from_the_committed_table_is_found(change):
    assert not triton_compile.complaints([GOOD | {"registers": 250}], {KEY: COMMITTED})
    assert triton_compile.differences(GOOD | change, COMMITTED)


def test_kernel_that_is_not_in_the_table_is_found():
    (complaint,) = triton_compile.complaints([GOOD], {})
    assert "not in the committed table" in complaint


def test_occupancy_is_of_whole_programs():
    assert triton_ahead.occupancy("sm_90", 255, 98328, 8) == (8 / 64, "registers")
    assert triton_ahead.occupancy("sm_90", 32, 0, 8) == (1, "registers")
    assert triton_ahead.occupancy("sm_90", 32, 120 * 1024, 4) == (4 / 64, "shared memory")
    assert triton_ahead.occupancy("sm_80", 16, 0, 1) == (32 / 64, "programs")
    assert triton_ahead.occupancy("gfx942", 256, 16 * 1024, 4) == (8 / 32, "registers")


@pytest.mark.exhaustive
def test_bytes_and_flops_are_those_of_the_docstrings():
    counted = triton_ahead.rows_of("benchmarks.compiled.triton_traffic", "--equalities")
    assert {"sweep", "statistics_kernel", "totals_kernel", "gradient_kernel"} <= {row["what"].split(",")[0] for row in counted}
    assert not [row for row in counted if row["counted"] != row["formula"]]


def test_counting_follows_loops_branches_and_programs():
    ttir = """
    tt.func public @kernel(%a: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("a"(#loc)), %n: i32 loc("n"(#loc))) {
      %zero = arith.constant 0 : i32 loc(#loc1)
      %step = arith.constant 4 : i32 loc(#loc1)
      %pid = tt.get_program_id x : i32 loc(#loc2)
      %first = arith.cmpi eq, %pid, %zero : i32 loc(#loc2)
      %many = tt.splat %a : !tt.ptr<f32> -> tensor<4x!tt.ptr<f32>> loc(#loc3)
      scf.for %at = %zero to %n step %step  : i32 {
        %x = tt.load %many, %mask : tensor<4x!tt.ptr<f32>> loc(#loc4)
        %e = math.exp %x : tensor<4xf32> loc(#loc4)
      } loc(#loc5)
      scf.if %first {
        tt.store %many, %y : tensor<4x!tt.ptr<f32>> loc(#loc6)
      } else {
        tt.store %a, %z : !tt.ptr<f32> loc(#loc6)
      } loc(#loc7)
    }
    """
    found = triton_traffic.count(ttir, {"n": 10, "flag": True}, (3,))
    assert found == {("load", "a"): 3 * 3 * 16, "exp": 3 * 3 * 4, ("store", "a"): 16 + 2 * 4}


def test_committed_bounds_are_those_of_the_model():
    with (record.RESULTS / "triton_traffic.csv").open(newline="") as file:
        committed = list(csv.DictReader(file))
    made = triton_traffic.bounds()
    assert len(made) == len(committed)
    for new, old in zip(made, committed, strict=True):
        assert {name: float(f"{v:.6g}") if isinstance(v, float) else str(v) for name, v in new.items()} == {
            name: float(old[name]) if isinstance(v, float) else old[name] for name, v in new.items()
        }


def test_bound_is_the_slowest_resource():
    case = triton_traffic.Case(4096, 131072, 2048, 4096)
    small, large = triton_traffic.bound(case, 64, 64), triton_traffic.bound(case, 512, 512)
    assert small["binds"] == "l2" and math.isclose(small["bound_ms"], small["l2_ms"])
    assert large["binds"] == "matrix" and large["of_matrix"] >= 1
    assert small["l2_ms"] == pytest.approx(large["l2_ms"] * 8)


def test_chunks_are_those_of_the_plan():
    case = triton_traffic.Case(8192, 128256, 2048, 4096)
    gradients = {"d_hidden": True, "d_weight": True}
    fused, chunked, sampled = (triton_traffic.chunks_of(case, **o) for o in ({}, gradients, gradients | {"column_fraction": 0.08}))
    assert sum(fused) == sum(chunked) == sum(sampled) == case.tokens
    # By hand: two float32 logits and a bfloat16 dz for each entry, in a GiB; at most 512 tokens share a sample.
    assert 0.95 * 2**30 / (10 * case.vocabulary) < chunked[0] < 2**30 / (10 * case.vocabulary)
    assert max(sampled) == 512 and chunked[0] < fused[0] < case.tokens


def test_every_chunk_reads_the_heads_and_adds_to_d_weight():
    case = triton_traffic.Case(4096, 131072, 2048, 4096)
    peaks = dataclasses.replace(triton_traffic.H100, flops=1e99, exponentials=1e99, dram=1e3)  # bytes, as milliseconds
    one, four = (triton_traffic.chunked_bound(case, [case.tokens // n] * n, peaks=peaks)["bound_ms"] for n in (1, 4))
    heads = 2 * case.vocabulary * (2 * case.student_dim + case.teacher_dim)
    assert four - one == pytest.approx(3 * (heads + 8 * case.vocabulary * case.student_dim))
    # 30 bytes an entry and token, the models and what becomes of the gradients.
    tokens = 2 * case.tokens * (2 * case.student_dim + case.teacher_dim) + 4 * case.tokens * case.student_dim
    finish = 14 * (case.tokens + case.vocabulary) * case.student_dim
    assert one == pytest.approx(30 * case.tokens * case.vocabulary + heads + tokens + 4 * case.vocabulary * case.student_dim + finish)
    swept, again = (triton_traffic.bound(case, 128, 128, [case.tokens // n] * n)["dram_ms"] for n in (1, 4))
    assert 3.5 < again / swept <= 4


def test_sampled_columns_save_products_and_not_what_comes_before_them():
    case = triton_traffic.Case(8192, 128256, 2048, 4096)
    dense, sampled = (triton_traffic.chunked_bound(case, [512] * 16, fraction) for fraction in (0.0, 0.08))
    products = 2 * case.tokens * case.vocabulary / triton_traffic.H100.flops * 1e3
    assert dense["matrix_ms"] == pytest.approx(products * (3 * case.student_dim + case.teacher_dim))
    assert sampled["matrix_ms"] == pytest.approx(products * (1.16 * case.student_dim + case.teacher_dim), rel=1e-4)
    assert sampled["bound_ms"] < dense["bound_ms"] and sampled["exp_ms"] == dense["exp_ms"]
