"""Distillation with the vocabulary divided: each rank holds some rows of both LM heads, and no rank ever a whole one.

    torchrun --standalone --nproc-per-node 2 examples/torchrun_vocab_parallel.py

On a GPU for each rank the same file runs by NCCL. Everything below the heads is whole on every rank here, and reads the same tokens: in its
place stands whatever makes hidden states that all ranks have, such as a tensor-parallel body. If each rank has the hidden states of some of
the tokens (sequence parallelism), the loss takes sequence_parallel=True.
"""

import stand_ins
import torch
import torch.distributed as dist
from torch import nn

from distill_kernels import distillation_loss, next_token_labels


def main():
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dist.init_process_group("gloo" if device.type == "cpu" else None)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if device.type != "cpu":
        torch.accelerator.set_device_index(rank % torch.accelerator.device_count())

    student, teacher = (model.to(device) for model in stand_ins.models())
    # This rank's rows of the vocabulary; they need not be as many on every rank, but the same of both heads.
    own = torch.arange(student.config.vocab_size).tensor_split(world_size)[rank].to(device)
    student_rows, teacher_rows = nn.Parameter(student.lm_head.weight[own].detach()), teacher.lm_head.weight[own]
    student.lm_head = teacher.lm_head = None
    optimizer = torch.optim.AdamW([*student.parameters(), student_rows], lr=stand_ins.LEARNING_RATE)

    for step, batch in enumerate(stand_ins.rows().split(stand_ins.BATCH)):
        input_ids = batch.to(device)
        with torch.no_grad():
            teacher_hidden = teacher.model(input_ids=input_ids).last_hidden_state
        student_hidden = student.model(input_ids=input_ids).last_hidden_state
        loss = distillation_loss(
            student_hidden, student_rows, teacher_hidden, teacher_rows, next_token_labels(input_ids),
            temperature=2.0, ce_weight=0.1, process_group=dist.group.WORLD,
        )  # fmt: skip
        loss.backward()  # the gradient of student_hidden is whole on every rank, so that the bodies stay alike by themselves
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step + 1} loss {loss.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
