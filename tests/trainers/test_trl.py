"""TRL's own trainers with their losses from hidden states: what they compute, log and learn is what they do without, in less memory."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill_kernels import TRLDistillationMixin, TRLGKDMixin

pytest.importorskip("trl")

import trl_runs
from document_blocks import ROOT, run_python_blocks
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma2Config, Gemma2ForCausalLM, set_seed
from trl import DistillationTrainer
from trl.experimental.gkd import GKDTrainer
from trl_runs import VOCABULARY, distillation, gkd, llama, parameters

UPSTREAM = 1.7

pytestmark = pytest.mark.filterwarnings("ignore")  # trl and transformers deprecate each other


class FusedGKD(TRLGKDMixin, GKDTrainer):
    pass


class FusedDistillation(TRLDistillationMixin, DistillationTrainer):
    pass


def gkd_batch(tokens=24, vocabulary=VOCABULARY, batch=3):
    """What the collator makes: prompts on the left, padding, labels of the completion alone, not shifted."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(6, vocabulary, (batch, tokens), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :5] = 0
    labels = input_ids.clone()
    for row in range(batch):
        labels[row, : 6 + row] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def distillation_batch(tokens=24, prompt=9, vocabulary=VOCABULARY, tools=True):
    ids = gkd_batch(tokens, vocabulary)
    completion_ids = ids["input_ids"][:, prompt:]
    completion_mask, tool_mask = torch.ones_like(completion_ids), torch.ones_like(completion_ids)
    completion_mask[1, -4:] = 0
    tool_mask[2, 3:6] = 0
    batch = {
        "prompt_ids": ids["input_ids"][:, :prompt],
        "prompt_mask": ids["attention_mask"][:, :prompt],
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
    }
    return batch | ({"tool_mask": tool_mask} if tools else {})


def loss_and_gradients(trainer, batch, num_items):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)
    (UPSTREAM * loss).backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_same(got, want, tolerance=1e-5):
    """(value, tensors by name), each to `tolerance` of its largest."""
    assert got[0].item() == pytest.approx(want[0].item(), rel=tolerance)
    assert got[1].keys() == want[1].keys()
    for name, wanted in want[1].items():
        assert wanted.abs().max() > 0, f"{name} has no gradient to compare"
        error = (got[1][name] - wanted).abs().max().item()
        assert error <= tolerance * wanted.abs().max().item(), f"{name} is off by {error:.3g} of {wanted.abs().max():.3g}"


@pytest.mark.parametrize("num_items", [None, torch.tensor(53), 53], ids=["mean", "tensor", "int"])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkd_loss_and_gradients_are_those_of_trl(beta, num_items, tmp_path):
    want = loss_and_gradients(gkd(GKDTrainer, tmp_path, beta=beta), gkd_batch(), num_items)
    assert_same(loss_and_gradients(gkd(FusedGKD, tmp_path, beta=beta), gkd_batch(), num_items), want)


@pytest.mark.parametrize("num_items", [None, torch.tensor(53.0)], ids=["mean", "tensor"])
@pytest.mark.parametrize(("beta", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 1.5)])
def test_distillation_loss_and_gradients_are_those_of_trl(beta, temperature, num_items, tmp_path):
    want, got = (
        loss_and_gradients(distillation(kind, tmp_path, beta=beta, temperature=temperature), distillation_batch(), num_items)
        for kind in (DistillationTrainer, FusedDistillation)
    )
    assert_same(got, want)


def test_softcaps_are_those_of_trl(tmp_path):
    def gemma(seed, hidden_size):
        set_seed(seed)
        config = Gemma2Config(
            hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            vocab_size=VOCABULARY, final_logit_softcapping=3.0, initializer_range=0.4,
        )  # fmt: skip
        return Gemma2ForCausalLM(config)

    trainers = (
        make(kind, tmp_path, student=gemma(2, 32), teacher=gemma(1, 48))
        for make, kind in ((distillation, DistillationTrainer), (distillation, FusedDistillation), (gkd, GKDTrainer), (gkd, FusedGKD))
    )
    trl_distillation, ours_distillation, trl_gkd, ours_gkd = trainers
    batch = distillation_batch()
    assert_same(loss_and_gradients(ours_distillation, batch, None), loss_and_gradients(trl_distillation, batch, None))
    assert_same(loss_and_gradients(ours_gkd, gkd_batch(), None), loss_and_gradients(trl_gkd, gkd_batch(), None))


@pytest.mark.parametrize(
    ("make", "theirs", "ours", "batch"),
    [(gkd, GKDTrainer, FusedGKD, gkd_batch), (distillation, DistillationTrainer, FusedDistillation, distillation_batch)],
    ids=["gkd", "distillation"],
)
def test_lora_students_get_the_gradients_of_trl(make, theirs, ours, batch, tmp_path):
    peft = pytest.importorskip("peft")

    def student():
        config = peft.LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(llama(2, 32), config)

    want, got = (loss_and_gradients(make(kind, tmp_path, student=student()), batch(), None) for kind in (theirs, ours))
    assert len(want[1]) == 2 * 2 * 2  # A and B of two projections in two layers, and nothing else
    assert_same(got, want)


def test_a_frozen_head_gets_no_gradient(tmp_path):
    student = llama(2, 32)
    student.lm_head.weight.requires_grad_(False)
    _, gradients = loss_and_gradients(distillation(FusedDistillation, tmp_path, student=student), distillation_batch(), None)
    assert student.lm_head.weight.grad is None and "lm_head.weight" not in gradients


def run(trainer):
    """Losses, gradient norms and other figures of every step, of the evaluation after, and the parameters that were learned."""
    set_seed(3)
    trainer.train()
    names = ("loss", "grad_norm", "entropy", "num_tokens")
    steps = [[entry[name] for name in names if name in entry] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = trainer.evaluate()
    return steps, [evaluated[name] for name in ("eval_loss", "eval_entropy") if name in evaluated], parameters(trainer.model)


@pytest.mark.parametrize(
    ("make", "theirs", "ours"),
    [(gkd, GKDTrainer, FusedGKD), (distillation, DistillationTrainer, FusedDistillation)],
    ids=["gkd", "distillation"],
)
def test_a_run_on_the_students_own_samples_is_that_of_trl(make, theirs, ours, tmp_path):
    """Samples of the student, accumulated micro-batches, optimizer, evaluation."""
    want_steps, want_evaluated, want_learned = run(make(theirs, tmp_path))
    got_steps, got_evaluated, got_learned = run(make(ours, tmp_path))
    assert len(want_steps) == 3
    for got, want in zip([*got_steps, got_evaluated], [*want_steps, want_evaluated], strict=True):
        assert got == pytest.approx(want, rel=2e-5)
    start = parameters(llama(2, 32))
    for name, want in want_learned.items():
        moved = (want - start[name]).abs().max().item()
        # Adam's first steps are signs: where a gradient is of rounding's size, so is the difference.
        assert moved > 1e-3 and (got_learned[name] - want).abs().max().item() <= 1e-2 * moved, name


def test_autocast_is_the_trainers(tmp_path):
    """bf16=True: bfloat16 products. TRL rounds the logits as well; both are near the float32 loss, and not it."""
    exact, _ = loss_and_gradients(gkd(GKDTrainer, tmp_path), gkd_batch(), None)
    theirs, ours = (loss_and_gradients(gkd(kind, tmp_path, bf16=True), gkd_batch(), None)[0] for kind in (GKDTrainer, FusedGKD))
    assert ours.dtype == torch.float32 and ours != exact
    assert abs(ours - exact) <= 2 * max(abs(theirs - exact), 1e-3 * exact)


def test_options_of_the_loss_are_honoured(tmp_path):
    class WithLabels(TRLGKDMixin, GKDTrainer):
        loss_options = {"ce_weight": 0.5, "kd_weight": 0.0}  # noqa: RUF012

    trainer = gkd(WithLabels, tmp_path)
    batch = gkd_batch()
    loss, _ = loss_and_gradients(trainer, batch, None)
    assert loss.item() == pytest.approx(0.5 * trainer.model(**batch).loss.item(), rel=1e-5)


def peak_mib(step):
    """Highest sum of what torch's CPU allocator has given out during a call, above what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    assert events
    return highest / 2**20


@pytest.mark.parametrize("kind", ["gkd", "distillation"])
def test_peak_memory_is_a_fraction_of_trls(kind, tmp_path):
    """One batch of 192 tokens, 49,152 entries, both gradients: their logits alone are 36 MiB."""
    vocabulary = 49152
    theirs, ours = {"gkd": (GKDTrainer, FusedGKD), "distillation": (DistillationTrainer, FusedDistillation)}[kind]
    make = {"gkd": gkd, "distillation": distillation}[kind]
    batch = gkd_batch(64, vocabulary) if kind == "gkd" else distillation_batch(64, 2, vocabulary, tools=False)

    class Small(ours):
        loss_options = {"workspace_mib": 16}  # noqa: RUF012

    peaks = []
    for trainer in (theirs, Small):
        made = make(trainer, tmp_path, student=llama(2, 16, vocabulary), teacher=llama(1, 16, vocabulary))
        made.compute_loss(made.model, dict(batch)).backward()  # whatever is allocated once
        made.model.zero_grad()
        peaks.append(peak_mib(lambda made=made: made.compute_loss(made.model, dict(batch)).backward()))
    head = vocabulary * 16 * 4 / 2**20
    assert peaks[1] < 16 + 3 * head + 4  # the workspace, the gradients of embeddings and head, and a small model
    assert peaks[0] > 5 * peaks[1], peaks


# What goes wrong, before any training


def test_a_class_put_together_the_wrong_way_round_is_refused(tmp_path):
    with pytest.raises(TypeError, match="Behind has GKDTrainer before the mix-in"):

        class Behind(GKDTrainer, TRLGKDMixin):
            pass

    class Other(TRLDistillationMixin, GKDTrainer):
        pass

    class Overridden(GKDTrainer):
        def compute_loss(self, *args, **kwargs):
            raise AssertionError

    class OverAnother(TRLGKDMixin, Overridden):
        pass

    with pytest.raises(TypeError, match=r"wanted class Other\(TRLDistillationMixin, DistillationTrainer\)"):
        gkd(Other, tmp_path)
    with pytest.raises(TypeError, match=r"found that of .*Overridden.* leaves compute_loss alone"):
        gkd(OverAnother, tmp_path)


def test_another_trl_is_told_by_its_method(monkeypatch, tmp_path):
    def moved(self, student, inputs):
        raise AssertionError

    monkeypatch.setattr(DistillationTrainer, "_compute_loss", moved)
    with pytest.raises(TypeError, match=r"knows trl 1\.16, .* that of the trl installed takes self, student, inputs"):
        distillation(FusedDistillation, tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"temprature": 2.0}, TypeError, "no option temprature"),
        ({"column_fraction": 2.0}, ValueError, "column_fraction must be"),
        ({"reduction": "none"}, ValueError, "reduction"),
        ({"process_group": None}, ValueError, "process_group, but the trainer's ranks have rows of their own"),
        ({"sequence_parallel": True}, ValueError, "sequence_parallel, but the trainer's ranks have whole rows"),
    ],
)
def test_a_wrong_option_is_refused_before_training(options, error, words, tmp_path):
    class Wrong(TRLGKDMixin, GKDTrainer):
        loss_options = options

    with pytest.raises(error, match=words):
        gkd(Wrong, tmp_path)


def test_metrics_of_logits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_metrics, which needs logits"):
        gkd(FusedGKD, tmp_path, made_with={"compute_metrics": lambda prediction: {}})


def test_a_trainer_without_a_teacher_is_refused(tmp_path):
    class Teacherless(TRLDistillationMixin, DistillationTrainer):
        def __init__(self, *, teacher_model, **options):
            super().__init__(teacher_model=None, **options)

    with pytest.raises(ValueError, match="got no teacher_model"):
        distillation(Teacherless, tmp_path)


# Two processes, and what the page promises

TWO_PROCESSES = """
import sys

import torch
import torch.distributed as dist
from trl import DistillationTrainer
from trl.experimental.gkd import GKDTrainer
from trl_runs import distillation, gkd, parameters

from distill_kernels import TRLDistillationMixin, TRLGKDMixin


class FusedGKD(TRLGKDMixin, GKDTrainer):
    pass


class FusedDistillation(TRLDistillationMixin, DistillationTrainer):
    pass


learned = []
for make, kinds in ((gkd, (GKDTrainer, FusedGKD)), (distillation, (DistillationTrainer, FusedDistillation))):
    for kind in kinds:
        trainer = make(kind, sys.argv[1], max_steps=2)
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        learned.append((losses, parameters(trainer.accelerator.unwrap_model(trainer.model))))
for (want_losses, want), (losses, got) in (learned[0:2], learned[2:4]):
    assert len(losses) == 2
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(want_losses), rtol=2e-5, atol=0)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=2e-5)
        everywhere = [torch.empty_like(got[name]) for _ in range(2)]
        dist.all_gather(everywhere, got[name])
        assert torch.equal(*everywhere), name  # gradients were summed
print("two processes agree")
"""


@pytest.mark.exhaustive
def test_two_processes_learn_what_they_do_with_trl(tmp_path):
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(tmp_path)]
    made = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=240)
    assert made.returncode == 0, made.stderr[-4000:]
    assert made.stdout.count("two processes agree") == 2


def test_python_blocks_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    conversations = trl_runs.conversations(16)
    ran = run_python_blocks(
        "docs/trl.md",
        at_least=2,
        student=llama(2, 32),
        teacher=llama(1, 48),
        tokenizer=trl_runs.tokenizer(),
        conversations=trl_runs.Dataset.from_list([{"messages": conversation} for conversation in conversations]),
        prompts=trl_runs.Dataset.from_list([{"prompt": conversation[:1]} for conversation in conversations]),
    )
    assert ran["trainer"].state.global_step == ran["on_policy"].state.global_step == 2


def test_the_example_on_policy_runs(tmp_path, monkeypatch, capsys):
    teacher = llama(1, 48, num_hidden_layers=5)
    teacher.save_pretrained(tmp_path / "teacher")
    trl_runs.tokenizer().save_pretrained(tmp_path / "teacher")
    options = ["--teacher", str(tmp_path / "teacher"), "--steps", "3", "--batch-size", "2", "--completion", "6", "--learning-rate", "3e-3"]
    monkeypatch.setattr(sys, "argv", ["trl_on_policy.py", *options])
    runpy.run_path(str(ROOT / "examples" / "trl_on_policy.py"), run_name="__main__")
    before, after = map(float, re.search(r"([\d.]+) nats before, ([\d.]+) after 3 steps", capsys.readouterr().out).groups())
    assert 0 < after < before


@pytest.mark.parametrize("kind", ["GKDTrainer", "DistillationTrainer"])
def test_the_example_of_memory_measures_one_loss_in_two_ways(kind, tmp_path):
    example = runpy.run_path(str(ROOT / "examples" / "trl_memory.py"))
    losses = []
    for fused in (False, True):
        set_seed(0)
        trainer = example["make_trainer"](kind, fused, 500, torch.float32, str(tmp_path))
        losses.append(trainer.compute_loss(trainer.model, example["make_batch"](kind, 40, 500)).item())
        assert isinstance(trainer, (TRLGKDMixin, TRLDistillationMixin)) == fused
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0] > 1e-3  # two new models are close to each other
