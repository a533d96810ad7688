"""examples/sequence_distillation.py: from the teacher's answers to a student that has learned them."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import WORDS, save_llama

pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("sequence_distillation", EXAMPLES / "sequence_distillation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    save_llama(tmp_path / "teacher", initializer_range=0.6)  # sure of itself: answers that can be learned
    questions = [f"{first} {second}" for first in WORDS[:20] for second in WORDS[50:54]]
    lines = "".join(json.dumps({"question": question}) + "\n" for question in questions)
    (tmp_path / "questions.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def run(example, monkeypatch, capsys, folder, *more):
    """What is printed of held-out answers, before and after: [[cross entropy, KL, agreement in percent], ...]."""
    arguments = ["--teacher", folder / "teacher", "--questions", folder / "questions.jsonl", "--answers", folder / "answers.jsonl"]
    sizes = ["--longest", 12, "--steps", 24, "--learning-rate", 0.01, "--output", folder / "student"]
    monkeypatch.setattr(sys, "argv", ["sequence_distillation.py", *map(str, [*arguments, *sizes, *more])])
    example.main()
    printed = capsys.readouterr().out
    found = re.findall(r"cross entropy (\S+) nats, KL\(teacher‖student\) (\S+) nats, top-1 agreement (\S+) %", printed)
    return [list(map(float, numbers)) for numbers in found]


def test_a_student_learns_the_answers_that_the_teacher_wrote(example, folder, monkeypatch, capsys):
    before, after = run(example, monkeypatch, capsys, folder)
    assert after[0] < before[0] - 0.5
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 80 and sum(bool(pair["answer"]) for pair in answers) > 60
    assert (folder / "student" / "model.safetensors").exists()
    # Answers that are there are not written again; the mix brings the student closer to the teacher's distributions, too.
    written = (folder / "answers.jsonl").stat().st_mtime_ns
    again, mixed = run(example, monkeypatch, capsys, folder, "--kd-weight", 1, "--ce-weight", 0.5)
    assert (folder / "answers.jsonl").stat().st_mtime_ns == written and again == before
    assert mixed[1] < after[1] and mixed[0] < before[0] - 0.5


def test_only_answers_are_learned_and_padding_is_not(example):
    """The loss of a padded batch is that of its rows one by one, from the position before the answer on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50, "initializer_range": 0.4}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, **sizes))
    rows = [([4, 9, 7, 3, 1], 2), ([8, 2, 6], 2), ([5, 5, 5, 5, 5, 5, 40], 4)]
    quality = example.measure(model, model, rows, 2)
    losses = [F.cross_entropy(model(torch.tensor([ids])).logits[0, n - 1 : -1], torch.tensor(ids[n:]), reduction="none") for ids, n in rows]
    assert quality["cross_entropy"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert quality["divergence"] == pytest.approx(0, abs=1e-6) and quality["top1_agreement"] == 1


def test_only_an_answer_that_came_to_its_end_teaches_to_end(example, folder):
    from distill_kernels.api.models import initial_models

    model, tokenizer = initial_models.load("--teacher", folder / "teacher")
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    first, second = WORDS[:2]
    pairs = [{"question": first, "answer": second, **more} for more in ({"finished": True}, {"finished": False}, {})]
    ids = [example.encoded(tokenizer, [pair])[0] for pair in pairs]
    assert [(row[-1] == tokenizer.eos_token_id, prompt) for row, prompt in ids] == [(True, 1), (False, 1), (True, 1)]
    # Every id ends, or none does: what the teacher is asked for is what decides.
    for ends, finished in ((list(range(300)), True), (None, False)):
        model.generation_config.eos_token_id = ends
        assert [pair["finished"] for pair in example.answer(model, tokenizer, WORDS[:3], 2, 4)] == [finished] * 3


def test_padding_on_the_left_continues_every_prompt_as_if_it_were_alone(example, folder):
    from distill_kernels.api.models import initial_models

    model, _ = initial_models.load("--teacher", folder / "teacher")
    prompts = [[5, 9, 13], [7]]
    batch = example.padded([(ids, len(ids)) for ids in prompts], on_the_left=True)
    assert batch["input_ids"].tolist() == [[5, 9, 13], [0, 0, 7]] and batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    together = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)[:, 3:]
    for ids, continued in zip(prompts, together, strict=True):
        alone = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), **options)
        assert torch.equal(alone[0, len(ids) :], continued)
