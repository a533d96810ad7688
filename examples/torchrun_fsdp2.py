"""Distillation with plain FSDP2: the loss in the forward of the sharded module, where the LM head is whole.

    torchrun --standalone --nproc-per-node 2 examples/torchrun_fsdp2.py
"""

import stand_ins
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from distill_kernels import distillation_loss, next_token_labels, run_backbone


class StudentWithLoss(nn.Module):
    """The root that is sharded; the student itself stays unwrapped, so that run_backbone takes it."""

    def __init__(self, student, **loss_options):
        super().__init__()
        self.student, self.loss_options = student, loss_options

    def forward(self, input_ids, taught, labels, num_items):
        learned = run_backbone(self.student, input_ids=input_ids)
        return distillation_loss(**learned.as_student(), **taught.as_teacher(), labels=labels, num_items=num_items, **self.loss_options)


def main():
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    dist.init_process_group("gloo" if device.type == "cpu" else None)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if device.type != "cpu":
        torch.accelerator.set_device_index(rank % torch.accelerator.device_count())

    student, teacher = stand_ins.models()
    teacher.to(device)  # whole on every rank; a large one is sharded like the student, its run_backbone in its root's forward
    model = StudentWithLoss(student.to(device), temperature=2.0, ce_weight=0.1)
    mesh = dist.init_device_mesh(device.type, (world_size,))
    for layer in student.model.layers:
        fully_shard(layer, mesh=mesh)
    # Embeddings, norm and head: gathered before this forward, and kept for backward.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=stand_ins.LEARNING_RATE)

    for step, batch in enumerate(stand_ins.rows().split(stand_ins.BATCH)):
        input_ids = batch.chunk(world_size)[rank].to(device)
        labels = next_token_labels(input_ids)
        with torch.no_grad():
            taught = run_backbone(teacher, input_ids=input_ids)
        num_items = (labels != -100).sum()
        dist.all_reduce(num_items)
        # FSDP takes the mean of the ranks' gradients, so that each divides by its share of the tokens of all.
        loss = model(input_ids, taught, labels, num_items / world_size)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / world_size
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {step + 1} loss {total.item():.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
