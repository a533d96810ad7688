"""What each of two processes runs for test_trainer_distributed.py: python trainer_processes.py FOLDER.

The environment is that of torchrun, which the examples' tests run. Here one process imports everything and forks, for half of the time.
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from trainer_runs import distillation_trainer, make_student, make_teacher, pad, rows, trained

from distill_kernels import distillation_loss, next_token_labels, run_backbone
from distill_kernels.api.trainers.distillation_trainer import forward_replaced

OPTIONS = {"temperature": 2.0, "ce_weight": 0.3}


def replicated(folder: Path):
    """DistributedDataParallel by way of accelerate."""
    changes = {"per_device_train_batch_size": 1, "logging_steps": 2}
    trainer = trained(distillation_trainer(folder, train=16, arguments_changes=changes, **OPTIONS))
    assert type(trainer.model_wrapped) is torch.nn.parallel.DistributedDataParallel
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / "replicated"))
    if trainer.is_world_process_zero():
        (folder / "replicated.json").write_text(json.dumps({"history": trainer.state.log_history, "metrics": metrics}))


def loss_of_a_batch(student, teacher):
    batch = {name: value for name, value in pad(rows(4)).items() if name != "labels"}
    labels = next_token_labels(batch["input_ids"], attention_mask=batch["attention_mask"])
    with torch.no_grad():
        taught = run_backbone(teacher, **batch).as_teacher()

    def forward(student):
        return distillation_loss(**run_backbone(student, **batch).as_student(), **taught, labels=labels, **OPTIONS)

    with forward_replaced(student, forward):
        return student()


def sharded(folder: Path):
    """fully_shard, whose whole head there is inside of the forward alone."""
    teacher, plain, student = make_teacher(), make_student(), make_student()
    loss_of_a_batch(plain, teacher).backward()
    for layer in student.model.layers:
        fully_shard(layer)
    fully_shard(student)
    try:
        run_backbone(student, **pad(rows(1)))
    except TypeError as error:
        assert "whole only inside of the sharded model's forward" in str(error)
    else:
        raise AssertionError("a shard was taken for a head")
    loss = loss_of_a_batch(student, teacher)
    loss.backward()
    assert type(student.lm_head.weight) is torch.distributed.tensor.DTensor
    for name, parameter in plain.named_parameters():
        gradient = student.get_parameter(name).grad.full_tensor()
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
        assert gradient.abs().max() > 0
    if torch.distributed.get_rank() == 0:
        (folder / "sharded.json").write_text(json.dumps(loss.item()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    child = os.fork()
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), "0" if child else "1")
    replicated(Path(sys.argv[1]))
    sharded(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
