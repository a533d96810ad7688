"""Distillation in Lightning: the loss in training_step, which Lightning calls inside of its wrappers, so that DDP sees every gradient.

    python examples/lightning_loop.py
"""

import lightning
import stand_ins
import torch
from torch.utils.data import DataLoader

from distill_kernels import distillation_loss, next_token_labels, run_backbone


class Distillation(lightning.LightningModule):
    def __init__(self, student, teacher, **loss_options):
        super().__init__()
        self.student, self.loss_options = student, loss_options
        self.unregistered = [teacher]  # in a list, so that it is in no checkpoint, no optimizer and no DDP bucket

    def on_fit_start(self):
        self.unregistered[0].to(self.device)

    def training_step(self, input_ids, batch_idx):
        with torch.no_grad():
            taught = run_backbone(self.unregistered[0], input_ids=input_ids)
        learned = run_backbone(self.student, input_ids=input_ids)
        labels = next_token_labels(input_ids)
        loss = distillation_loss(**learned.as_student(), **taught.as_teacher(), labels=labels, **self.loss_options)
        self.print(f"step {self.global_step + 1} loss {loss.item():.6f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), lr=stand_ins.LEARNING_RATE)


def main():
    student, teacher = stand_ins.models()
    trainer = lightning.Trainer(
        max_steps=stand_ins.STEPS, accelerator="auto", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Distillation(student, teacher, temperature=2.0, ce_weight=0.1), DataLoader(stand_ins.rows(), batch_size=stand_ins.BATCH))


if __name__ == "__main__":
    main()
