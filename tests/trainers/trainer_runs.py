"""Runs of Trainers on tiny models: what they are made of, and the Trainer whose loss is eager torch on logits."""

import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from distill_kernels import DistillationTrainer

VOCAB = 101
# initializer_range: far from uniform, as trained models are.
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB,
    "initializer_range": 0.3,
}  # fmt: skip


def tiny_llama(seed, **changes):
    set_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def make_student(**changes):
    return tiny_llama(0, **changes)


def make_teacher(**changes):
    return tiny_llama(1, **{"hidden_size": 24, **changes})


def rows(count, seed=2, vocabulary=VOCAB):
    """Sequences of 2 to 11 tokens, the first of them prompts that are not learned from; how many differs from row to row, but at least
    one, which has no label in any case: transformers 4 counts it."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(2, 12, (), generator=generator))
        ids = torch.randint(vocabulary, (length,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(1, length, (), generator=generator))] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def pad(batch):
    """On the right, to the longest row."""
    longest = max(len(row["input_ids"]) for row in batch)

    def laid_out(name, padding):
        return torch.stack([torch.nn.functional.pad(row[name], (0, longest - len(row[name])), value=padding) for row in batch])

    mask = torch.stack([(torch.arange(longest) < len(row["input_ids"])).long() for row in batch])
    return {"input_ids": laid_out("input_ids", 0), "attention_mask": mask, "labels": laid_out("labels", -100)}


def arguments(folder, **changes):
    defaults = {
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "optim": "sgd",
        "learning_rate": 0.1, "max_grad_norm": 1e9, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True, "dataloader_pin_memory": False, "seed": 3,
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**defaults, **changes})


def distillation_trainer(folder, student=None, train=13, evaluation=7, *, arguments_changes=None, **options):
    """max_grad_norm logs the norm and clips nothing; SGD, unlike Adam, sees how gradients are scaled."""
    options.setdefault("train_dataset", rows(train))
    options.setdefault("eval_dataset", rows(evaluation, seed=4))
    options.setdefault("data_collator", pad)
    options.setdefault("teacher_model", make_teacher())
    return DistillationTrainer(
        model=make_student() if student is None else student, args=arguments(folder, **(arguments_changes or {})), **options
    )


class EagerTrainer(Trainer):
    """The loss as one would write it in torch: from the logits of both models, normalised by Trainer's own count."""

    def __init__(self, *args, teacher, temperature=1.0, ce_weight=0.0, label_smoothing=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher, self.temperature, self.ce_weight, self.label_smoothing = teacher.eval(), temperature, ce_weight, label_smoothing

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        targets = inputs.pop("labels")[:, 1:]
        with torch.no_grad(), self.accelerator.autocast():
            teacher = self.teacher(**inputs).logits[:, :-1].float()
        student = model(**inputs).logits[:, :-1].float()
        log_p, log_q = ((logits / self.temperature).log_softmax(-1) for logits in (teacher, student))
        divergence = kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * self.temperature**2
        hard = cross_entropy(student.transpose(1, 2), targets, reduction="none", label_smoothing=self.label_smoothing)
        total = (torch.where(targets != -100, divergence, 0) + self.ce_weight * hard).sum()
        return total / num_items_in_batch


def curve(trainer, *names):
    """(steps, names) of what was logged at every step: loss and gradient norm, if no names are given."""
    names = names or ("loss", "grad_norm")
    return torch.tensor([[log[name] for name in names] for log in trainer.state.log_history if "loss" in log], dtype=torch.float64)


def trained(trainer, **options):
    """The trainer after its training."""
    trainer.train(**options)
    return trainer


def eager_trainer(folder, student=None, train=13, *, arguments_changes=None, **options):
    options.setdefault("teacher", make_teacher())
    return EagerTrainer(
        make_student() if student is None else student,
        arguments(folder, **(arguments_changes or {})),
        train_dataset=rows(train),
        data_collator=pad,
        **options,
    )


def assert_same_weights(got, wanted, rtol=5e-5, atol=5e-6):
    wanted = dict(wanted.named_parameters())
    assert wanted
    for name, parameter in got.named_parameters():
        torch.testing.assert_close(parameter, wanted.pop(name), rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    assert not wanted


def assert_same_run(got, wanted, rtol=5e-5):
    """To float32's rounding. Steps carry it on: at this learning rate, 0.1, what weights are off by has six times as much of an effect on
    the norm of a gradient after nine of them, measured by changing the first weights at random (at 0.5 it had forty times as much). A
    gradient is made by some ten sums, each off by some eps of its largest terms: 6·10·2⁻²⁴ is a tenth of `rtol`."""
    torch.testing.assert_close(curve(got), curve(wanted), rtol=rtol, atol=0)
    assert_same_weights(got.model, wanted.model)
