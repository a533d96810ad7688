"""On-policy distillation: the student writes, the teacher scores what it wrote, and the reverse KL divergence there is reduced.

    python examples/on_policy.py                                    # SmolLM2-135M and a student of twelve of its layers, on CPU
    python examples/on_policy.py --estimator sampled --discount 0.9
    python examples/on_policy.py --teacher FOLDER --student FOLDER --text FILE --steps 500

With x sampled from the student, and p and q the next-token distributions of teacher and student after x[:t], the estimators are

    full      KL(q‖p) at every t, over the whole vocabulary; its gradient has no noise but that of x
    sampled   −A_t · log q(x_t), A_t = Σ_{s≥t} discount^(s−t) · (log p(x_s) − log q(x_s)) less its mean: policy gradients. Without discount
              its expected gradient is that of `full`, from two numbers of a token; with one, earlier tokens answer for later ones.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from distill_kernels import distillation_loss, distillation_loss_and_stats, next_token_labels, run_backbone, token_logprobs
from distill_kernels.api.models import initial_models
from distill_kernels.api.progress_bar import progress
from distill_kernels.api.runs import corpus, loop
from distill_kernels.api.user_error import UserError

HELD_OUT = 32  # prompts


@torch.no_grad()
def write(student: nn.Module, prompts: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(input_ids (B, P + tokens), labels of what was written: -100 elsewhere), from prompts (B, P), at temperature 1."""
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    written = student.eval().generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, top_p=1.0, **length)
    mine = written.clone()
    mine[:, : prompts.shape[1]] = -100
    student.train()
    return written, next_token_labels(written, labels=mine)


def full(student: nn.Module, teacher: nn.Module, input_ids: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        taught = run_backbone(teacher, input_ids=input_ids)
    learned = run_backbone(student, input_ids=input_ids)
    return distillation_loss(**learned.as_student(), **taught.as_teacher(), labels=labels, divergence="reverse_kl")


def sampled(student: nn.Module, teacher: nn.Module, input_ids: Tensor, labels: Tensor, discount: float = 0.0) -> Tensor:
    with torch.no_grad():
        log_p, _ = token_logprobs(**run_backbone(teacher, input_ids=input_ids).as_logits(), token_ids=labels)
    log_q, _ = token_logprobs(**run_backbone(student, input_ids=input_ids).as_logits(), token_ids=labels)
    valid = labels != -100
    advantage = discounted(log_p - log_q.detach(), discount)
    advantage = torch.where(valid, advantage - advantage[valid].mean(), 0.0)
    return -(advantage * log_q).sum() / valid.sum()


def discounted(rewards: Tensor, discount: float) -> Tensor:
    """Σ_{s≥t} discount^(s−t) · rewards[:, s], of rewards (B, S)."""
    sums, later = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        later = rewards[:, t] + discount * later
        sums[:, t] = later
    return sums


@torch.no_grad()
def measure(student: nn.Module, teacher: nn.Module, prompts: Tensor, tokens: int) -> dict[str, float]:
    """What the student writes after held-out prompts: KL(q‖p), its own entropy and top-1 agreement, means of a token."""
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same random numbers before and after
        input_ids, labels = write(student, prompts, tokens)
    learned, taught = (run_backbone(model.eval(), input_ids=input_ids) for model in (student, teacher))
    _, stats = distillation_loss_and_stats(**learned.as_student(), **taught.as_teacher(), labels=labels, divergence="reverse_kl")
    student.train()
    return {name: stats.mean()[name].item() for name in ("divergence", "student_entropy", "top1_agreement")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="folder of a causal language model; default: SmolLM2-135M")
    parser.add_argument("--student", type=Path, help="the same; default: cut from the teacher's layers")
    parser.add_argument("--text", type=Path, help="prompts are windows of it; default: Python's manual")
    parser.add_argument("--warm-up", type=int, default=40, help="steps of forward KL on the text first; a broken student has no say")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--estimator", choices=("full", "sampled"), default="full")
    parser.add_argument("--discount", type=float, default=0.0, help="of rewards to come, in `sampled`")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--completion", type=int, default=32, help="tokens that the student writes")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--output", type=Path, help="folder to save the student to")
    given = parser.parse_args()

    torch.manual_seed(0)
    teacher, student, tokenizer = initial_models.load_pair(given.teacher, given.student)
    documents = corpus.split_documents(given.text, seed=0)
    length = given.prompt + given.completion
    steps = given.warm_up + given.steps
    windows, held_out, order = corpus.draw(documents, tokenizer, length, given.batch_size, steps, 0, HELD_OUT * length)
    if given.warm_up:
        text = loop.TaughtText(windows, model=teacher)
        optimizer_and_schedule = loop.optimizer_and_schedule(student, 1e-3, given.warm_up)
        losses = [made["loss"] for made in loop.train(student.train(), text, order[: given.warm_up], *optimizer_and_schedule)]
        print(f"warm-up: forward KL on the text {losses[-1]:.3f} nats after {given.warm_up} steps", flush=True)

    before = measure(student, teacher, held_out[:, : given.prompt], given.completion)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=given.learning_rate, weight_decay=0.0)
    bar = progress(order[given.warm_up :], "on-policy")
    for rows in bar:
        input_ids, labels = write(student, windows[rows][:, : given.prompt], given.completion)
        options = {"discount": given.discount} if given.estimator == "sampled" else {}
        loss = {"full": full, "sampled": sampled}[given.estimator](student, teacher, input_ids, labels, **options)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix_str(f"loss {loss.item():.3f}")
    after = measure(student, teacher, held_out[:, : given.prompt], given.completion)

    print(f"what the student writes after {len(held_out)} held-out prompts, means of a token:")
    for when, quality in (("before", before), (f"after {given.steps} steps", after)):
        print(
            f"{when:16} KL(student‖teacher) {quality['divergence']:.3f} nats, entropy {quality['student_entropy']:.3f} nats, "
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
