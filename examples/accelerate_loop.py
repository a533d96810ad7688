"""Distillation in a loop of Accelerate, gradients accumulated over two batches and normalised by the tokens of both and of all processes.

    python examples/accelerate_loop.py
    accelerate launch --num_processes 2 examples/accelerate_loop.py
"""

import contextlib

import stand_ins
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from distill_kernels import distillation_loss, next_token_labels, run_backbone

ACCUMULATED = 2


class StudentWithLoss(nn.Module):
    """What Accelerate wraps: the loss runs in its forward, for past a wrapper the gradients would not be reduced."""

    def __init__(self, student, **loss_options):
        super().__init__()
        self.student, self.loss_options = student, loss_options

    def forward(self, input_ids, taught, labels, num_items):
        learned = run_backbone(self.student, input_ids=input_ids)
        return distillation_loss(**learned.as_student(), **taught.as_teacher(), labels=labels, num_items=num_items, **self.loss_options)


def train(accelerator):
    student, teacher = stand_ins.models()
    model = StudentWithLoss(student, temperature=2.0, ce_weight=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=stand_ins.LEARNING_RATE)
    size = stand_ins.BATCH // ACCUMULATED // accelerator.num_processes
    loader = DataLoader(stand_ins.rows(), batch_size=size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    teacher.to(accelerator.device)

    batches = iter(loader)
    for step in range(stand_ins.STEPS):
        accumulated = [next(batches) for _ in range(ACCUMULATED)]
        labels = [next_token_labels(input_ids) for input_ids in accumulated]
        # Of all processes; a 0-d tensor, which the loss does not wait for.
        num_items = accelerator.reduce(sum((targets != -100).sum() for targets in labels), reduction="sum")
        total = 0.0
        for number, (input_ids, targets) in enumerate(zip(accumulated, labels, strict=True), start=1):
            # accelerator.accumulate would not do: it steps early, for it takes the batch fetched last to be the one at work.
            with accelerator.no_sync(model) if number < ACCUMULATED else contextlib.nullcontext():
                with torch.no_grad():
                    taught = run_backbone(teacher, input_ids=input_ids)
                loss = model(input_ids, taught, targets, num_items)
                accelerator.backward(loss * accelerator.num_processes)  # DDP takes the mean over processes
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {step + 1} loss {accelerator.reduce(total, reduction='sum').item():.6f}")


def main():
    accelerator = Accelerator()
    train(accelerator)
    accelerator.wait_for_everyone()
    accelerator.free_memory()  # DDP has to go before its process group: with gloo the process may hang otherwise
    accelerator.end_training()


if __name__ == "__main__":
    main()
