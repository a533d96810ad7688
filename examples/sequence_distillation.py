"""Sequence distillation, as DeepSeek-R1's small models were made: the teacher writes answers, and the student is fine-tuned on them.

    python examples/sequence_distillation.py                        # SmolLM2-135M answers questions on Python; CPU
    python examples/sequence_distillation.py --kd-weight 0.5 --ce-weight 0.5
    python examples/sequence_distillation.py --teacher FOLDER --student FOLDER --questions FILE.jsonl --answers kept.jsonl

With the default, cross entropy alone, the loss needs no teacher any more once it has written (kd_weight=0); here it stays, to be compared
with before and after, and so wants the student's tokenizer. The mix adds the divergence from the teacher's distributions.
"""

import argparse
import builtins
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from distill_kernels import distillation_loss, distillation_loss_and_stats, next_token_labels, run_backbone
from distill_kernels.api.models import initial_models
from distill_kernels.api.progress_bar import progress
from distill_kernels.api.runs import corpus, loop
from distill_kernels.api.user_error import UserError

HELD_OUT_FRACTION = 0.2  # of the questions
NO_TEACHER = {"teacher_hidden": None, "teacher_weight": None}


def default_questions() -> list[str]:
    names = [name for name in dir(builtins) if not name.startswith("_")]
    return [f"What is {name} in Python?" for name in names]


def as_prompt(tokenizer, question: str) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        return question + "\n"
    return tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def answer(teacher: nn.Module, tokenizer, questions: list[str], batch_size: int, longest: int) -> list[dict[str, str | bool]]:
    """The teacher's answers of at most `longest` tokens, sampled, to each question, and whether it came to an end."""
    ends = teacher.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [] if ends is None else [ends], dtype=torch.int64)
    written = []
    for start in progress(range(0, len(questions), batch_size), "teacher writes"):
        some = questions[start : start + batch_size]
        prompts = [tokenizer(as_prompt(tokenizer, question), add_special_tokens=False)["input_ids"] for question in some]
        batch = padded([(ids, len(ids)) for ids in prompts], on_the_left=True)
        inputs = {name: batch[name].to(teacher.device) for name in ("input_ids", "attention_mask")}
        ids = teacher.generate(**inputs, max_new_tokens=longest, do_sample=True, temperature=0.7, pad_token_id=0)
        replies = ids[:, inputs["input_ids"].shape[1] :].cpu()
        answers = tokenizer.batch_decode(replies, skip_special_tokens=True)
        finished = torch.isin(replies, ends).any(1).tolist()
        written += [
            {"question": question, "answer": text.strip(), "finished": end}
            for question, text, end in zip(some, answers, finished, strict=True)
        ]
    return written


def encoded(tokenizer, pairs: list[dict[str, str | bool]]) -> list[tuple[list[int], int]]:
    """(token ids of prompt, answer and, unless it was cut off, end; length of the prompt), of those that were answered at all."""
    rows = []
    for pair in pairs:
        prompt = tokenizer(as_prompt(tokenizer, pair["question"]), add_special_tokens=False)["input_ids"]
        reply = tokenizer(pair["answer"], add_special_tokens=False)["input_ids"]
        end = [tokenizer.eos_token_id] if pair.get("finished", True) and tokenizer.eos_token_id is not None else []
        if reply:
            rows.append((prompt + reply + end, len(prompt)))
    return rows


def padded(rows: list[tuple[list[int], int]], on_the_left: bool = False) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels (B, S), the prompts' labels -100: what next_token_labels and run_backbone take."""
    width = max(len(ids) for ids, _ in rows)
    batch = {name: [] for name in ("input_ids", "attention_mask", "labels")}
    for ids, prompt in rows:
        padding = [0] * (width - len(ids))
        for name, real, filler in (
            ("input_ids", ids, 0),
            ("attention_mask", [1] * len(ids), 0),
            ("labels", [-100] * prompt + ids[prompt:], -100),
        ):
            extra = [filler] * len(padding)
            batch[name].append(extra + real if on_the_left else real + extra)
    return {name: torch.tensor(values) for name, values in batch.items()}


def taught(teacher: nn.Module | None, batch: dict[str, Tensor]) -> dict:
    if teacher is None:
        return NO_TEACHER
    with torch.no_grad():
        return run_backbone(teacher, **batch).as_teacher()


@torch.no_grad()
def measure(student: nn.Module, teacher: nn.Module, rows: list[tuple[list[int], int]], batch_size: int) -> dict[str, float]:
    """On answers that the student has not seen: cross entropy, KL(teacher‖student) and top-1 agreement, means of a token."""
    sums, count = {"cross_entropy": 0.0, "divergence": 0.0, "top1_agreement": 0.0}, 0
    for start in range(0, len(rows), batch_size):
        batch = {name: tensor.to(student.device) for name, tensor in padded(rows[start : start + batch_size]).items()}
        learned = run_backbone(student.eval(), **batch)
        _, stats = distillation_loss_and_stats(**learned.as_student(), **taught(teacher, batch), labels=next_token_labels(**batch))
        count += int(stats.valid.sum())
        for name in sums:
            sums[name] += float(getattr(stats, name).sum())
    student.train()
    return {name: total / count for name, total in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="folder of a causal language model; default: SmolLM2-135M")
    parser.add_argument("--student", type=Path, help="the same; default: cut from the teacher's layers")
    parser.add_argument("--questions", type=Path, help='JSON lines with "question"; default: on the names that Python has built in')
    parser.add_argument("--answers", type=Path, default=Path("answers.jsonl"), help="where answers are kept; read if it is there")
    parser.add_argument("--longest", type=int, default=96, help="tokens of an answer, at most")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--kd-weight", type=float, default=0.0)
    parser.add_argument("--ce-weight", type=float, default=1.0)
    parser.add_argument("--output", type=Path, help="folder to save the student to")
    given = parser.parse_args()

    torch.manual_seed(0)
    teacher, student, tokenizer = initial_models.load_pair(given.teacher, given.student)

    if not given.answers.exists():
        questions = corpus.read_documents(given.questions, "question") if given.questions else default_questions()
        pairs = answer(teacher, tokenizer, questions, given.batch_size, given.longest)
        given.answers.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    pairs = [json.loads(line) for line in given.answers.read_text(encoding="utf-8").splitlines()]
    rows = encoded(tokenizer, pairs)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    first = max(1, int(len(rows) * HELD_OUT_FRACTION))
    held_out, train = [rows[i] for i in order[:first]], [rows[i] for i in order[first:]]
    tokens = sum(len(ids) - prompt for ids, prompt in train)
    print(f"{len(train)} answers of {tokens:,} tokens to train on, {len(held_out)} held out, in {given.answers}", flush=True)

    before = measure(student, teacher, held_out, given.batch_size)
    optimizer, schedule = loop.optimizer_and_schedule(student, given.learning_rate, given.steps)
    batches = corpus.epochs(len(train), given.batch_size, given.steps, torch.Generator().manual_seed(0))
    bar = progress(batches, "student learns")
    for chosen in bar:
        batch = {name: tensor.to(student.device) for name, tensor in padded([train[i] for i in chosen.tolist()]).items()}
        learned = run_backbone(student.train(), **batch)
        loss = distillation_loss(
            **learned.as_student(),
            **taught(teacher if given.kd_weight else None, batch),
            labels=next_token_labels(**batch),
            kd_weight=given.kd_weight,
            ce_weight=given.ce_weight,
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    after = measure(student, teacher, held_out, given.batch_size)

    print("held-out answers of the teacher, means of a token:")
    for when, quality in (("before", before), (f"after {given.steps} steps", after)):
        print(
            f"{when:16} cross entropy {quality['cross_entropy']:.3f} nats, KL(teacher‖student) {quality['divergence']:.3f} nats, "
            f"top-1 agreement {100 * quality['top1_agreement']:.1f} %"
        )
    if given.output:
        student.save_pretrained(given.output)
        tokenizer.save_pretrained(given.output)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
