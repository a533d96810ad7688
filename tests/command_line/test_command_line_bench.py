"""`distill-kernels bench`: what it measures, beside whom, and what it refuses to time."""

import json
import subprocess
import sys

import pytest
import torch

from distill_kernels import divergences
from distill_kernels.api.command_line import main
from distill_kernels.api.measuring import bench, loss_variants

SIZES = ["--tokens", "100", "--vocabulary", "8200", "--student-dim", "16", "--teacher-dim", "24", "--rounds", "2"]


def report_of(capsys, *more):
    assert main(["bench", *SIZES, "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def alone(monkeypatch):
    """Without other libraries, which take seconds to import."""
    monkeypatch.setattr(loss_variants, "peers", lambda *_, **__: {})


def test_bench_times_installed_libraries_whose_gradients_agree(capsys):
    pytest.importorskip("liger_kernel.chunked_loss")
    pytest.importorskip("trl.kernels.chunked_divergence")
    report = report_of(capsys, "--no-memory", "--divergence", "jensen_shannon(beta=0.3)")
    assert list(report["variants"]) == ["distill_kernels", "eager torch", "liger", "trl"] and not report["left_out"]
    for result in report["variants"].values():
        assert len(result["milliseconds"]) == 2 and result["median_ms"] > 0 and result["gradient_error"] < 1e-5
    assert report["settings"]["loss"]["divergence"] == ["jensen_shannon", [0.3]]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", divergences.jensen_shannon(beta=0.3)], ids=str)
def test_eager_loss_is_the_divergence(divergence):
    """Of its definition, in probability space."""
    torch.manual_seed(0)
    hidden, head, taught, teacher_head = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 4), (30, 4), (5, 6), (30, 6)))
    options = {"student_bias": torch.randn(30).double(), "student_softcap": 3.0, "teacher_logit_scale": 0.7}
    q = (3 * torch.tanh((hidden @ head.T + options["student_bias"]) / 3)).softmax(-1)
    p = (0.7 * (taught @ teacher_head.T)).softmax(-1)
    m = 0.3 * p + 0.7 * q
    truth = {
        "forward_kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "jensen_shannon(0.3)": 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1),
    }
    loss = loss_variants.eager(hidden, head, taught, teacher_head, divergence=divergence, **options)
    assert loss.item() == pytest.approx(truth[str(divergence)].mean().item(), rel=1e-5)


@pytest.mark.exhaustive
def test_bench_measures_memory_in_processes_of_their_own(alone, capsys):
    sizes = ["--tokens", "512", "--vocabulary", "50000", "--student-dim", "8", "--teacher-dim", "8", "--rounds", "1"]
    assert main(["bench", *sizes, "--workspace-mib", "16", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    ours, eager = (report["variants"][name]["peak_bytes"] for name in ("distill_kernels", "eager torch"))
    if ours is None:
        pytest.skip("this system does not tell")
    logits = 512 * 50_000 * 4
    assert 3 * logits < eager < 8 * logits
    # Gradients, a workspace of 16 MiB, and what the matrix library keeps for itself.
    assert 2**20 < ours < logits / 2 and report["predicted_peak_bytes"] < logits / 2


def test_bench_reports_sampled_gradients_as_estimates(alone, capsys):
    report = report_of(capsys, "--no-memory", "--column-fraction", "0.2")
    assert 1e-4 < report["variants"]["distill_kernels"]["gradient_error"] < 3
    assert report["left_out"] == {"liger": "it is not installed: pip install liger-kernel", "trl": "it is not installed: pip install trl"}


def test_bench_leaves_out_eager_torch_where_it_does_not_fit(alone, monkeypatch, capsys):
    monkeypatch.setattr(bench, "_free_bytes", lambda device: 2**20)
    assert main(["bench", *SIZES, "--no-memory"]) == 0
    printed = capsys.readouterr().out
    assert "eager torch was left out: its logits take" in printed and "distill_kernels " in printed
    monkeypatch.setattr(bench, "_free_bytes", lambda device: None)
    report = report_of(capsys, "--no-memory", "--divergence", "total_variation")
    assert list(report["variants"]) == ["distill_kernels"] and "not for total_variation" in report["left_out"]["eager torch"]


def test_bench_does_not_time_a_wrong_loss(alone, monkeypatch, capsys):
    right = bench.distillation_loss
    monkeypatch.setattr(bench, "distillation_loss", lambda *tensors, **options: 1.01 * right(*tensors, **options))
    assert main(["bench", *SIZES, "--no-memory"]) == 2
    assert "the gradients of distill_kernels are off by 1.0e-02" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, words",
    [
        (["--tokens", "0"], "--tokens"),
        (["--rounds", "0"], "--rounds"),
        (["--vocabulary", "0"], "vocabulary must be"),
        (["--workspace-mib", "0"], "workspace_mib must be"),
        (["--sweep", "int8"], "column_fraction"),
        (["--backend", "abacus"], "abacus"),
        (["--device", "meta"], "sees no such device"),
    ],
)
def test_bench_refuses_in_one_sentence(more, words, capsys):
    assert main(["bench", *SIZES, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("distill-kernels: ") and words in error and len(error.splitlines()) == 1


def test_peak_memory_forgets_what_was_before():
    code = """
import torch
from distill_kernels.api.measuring import peak_memory
torch.ones(100 * 2**20 // 4)
made = []
print(peak_memory.above(lambda: made.append(torch.ones(50 * 2**20 // 4)), torch.device("cpu")))
"""
    peak = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    if peak == "None":
        pytest.skip("this system does not tell")
    assert 45 * 2**20 < int(peak) < 60 * 2**20
