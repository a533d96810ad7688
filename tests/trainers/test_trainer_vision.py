"""Students and teachers that read images, trained to the numbers of eager torch."""

import pytest
import torch
from thinned import some
from trainer_runs import EagerTrainer, arguments, assert_same_run, curve, trained

from benchmarks.models.tiny import there
from benchmarks.models.tiny_vision import ARCHITECTURES, IMAGE, collate, tiny_vision_model, vision_rows
from distill_kernels import DistillationTrainer

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6")


def with_labels(rows):
    """What a user would write who masks images: of the first token, which is nobody's next, there is no label."""
    batch = collate(rows)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    labels[:, 0] = -100
    return {**batch, "labels": labels}


@pytest.mark.parametrize("model_type", some(there(name for name in ARCHITECTURES if not name.endswith("moe")), ["gemma3", "qwen2_5_vl"]))
def test_three_steps_are_those_of_eager_torch(tmp_path, model_type):
    options = {"temperature": 2.0, "ce_weight": 0.3}
    made = {"train_dataset": vision_rows(model_type, 12), "args": arguments(tmp_path, max_steps=3, learning_rate=1e-3)}
    eager = EagerTrainer(
        tiny_vision_model(model_type), teacher=tiny_vision_model(model_type, seed=1), data_collator=with_labels, **made, **options
    )
    eager.model_accepts_loss_kwargs = True  # for not every forward does, and then there is no count of tokens
    wanted = trained(eager)
    got = trained(
        DistillationTrainer(
            tiny_vision_model(model_type), teacher_model=tiny_vision_model(model_type, seed=1), data_collator=collate, **made, **options
        )
    )
    assert_same_run(got, wanted)
    assert torch.isfinite(curve(got)).all()
    assert len(curve(got)) == 3
