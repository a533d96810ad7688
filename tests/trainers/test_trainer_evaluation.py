"""What DistillationTrainer says of a student: evaluation, logs, predictions; and what it saves of it."""

import pytest
import torch
import transformers
from trainer_runs import (
    arguments,
    assert_same_weights,
    curve,
    distillation_trainer,
    make_student,
    pad,
    rows,
    tiny_llama,
    trained,
)

from distill_kernels import next_token_labels, reference, run_backbone
from distill_kernels.api.trainers.trainer_loss import METRICS


def oracle(trainer, data):
    """Means over all tokens, from logits in float64."""
    terms, weights = [], []
    options = trainer.loss.options
    temperature, ce_weight = options.get("temperature", 1.0), options.get("ce_weight", 0.0)
    for row in data:
        batch = {"input_ids": row["input_ids"][None]}
        with torch.no_grad():
            student, teacher = run_backbone(trainer.model.eval(), **batch), run_backbone(trainer.teacher_model, **batch)
        labels = next_token_labels(batch["input_ids"], labels=row["labels"][None])
        keep = labels != -100
        sides = {**student.as_student(), **teacher.as_teacher()}
        (divergence, ce, _), stats = reference.distillation_terms(**sides, labels=labels, temperature=temperature)
        loss = temperature**2 * divergence + ce_weight * ce
        terms.append(torch.stack([loss, *(stats[name] for name in METRICS.values())], -1)[keep])
        weights.append(int(keep.sum()))
    assert len(set(weights)) > 2  # so that a mean over rows, or over batches, is another number
    return dict(zip(("loss", *METRICS), torch.cat(terms).mean(0).tolist(), strict=True))


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_evaluation_is_the_mean_over_tokens(tmp_path, batch_size):
    """7 rows, so that the last batch of two is a single row."""
    teacher = make_student()
    with torch.no_grad():  # so that the models agree on some tokens
        teacher.lm_head.weight.add_(0.2 * torch.randn_like(teacher.lm_head.weight))
    changes = {"per_device_eval_batch_size": batch_size}
    trainer = distillation_trainer(tmp_path, teacher_model=teacher, temperature=2.0, ce_weight=0.3, arguments_changes=changes)
    wanted = {f"eval_{name}": value for name, value in oracle(trainer, rows(7, seed=4)).items()}
    metrics = trainer.evaluate()
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert 0 < wanted["eval_top1_agreement"] < 1


def test_training_and_evaluation_log_the_same_numbers(tmp_path):
    """A step over all rows, with a learning rate of 0: what it logs is what an evaluation says before and after."""
    data = rows(12)
    changes = {"learning_rate": 0.0, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "max_steps": 1}
    trainer = trained(
        distillation_trainer(tmp_path, train_dataset=data, eval_dataset=data, temperature=2.0, ce_weight=0.3, arguments_changes=changes)
    )
    metrics = trainer.evaluate()
    logged = trainer.state.log_history[0]
    assert {name: logged[name] for name in ("loss", *METRICS)} == pytest.approx(
        {name: metrics[f"eval_{name}"] for name in ("loss", *METRICS)}, rel=1e-5
    )


def test_logged_metrics_are_of_all_steps_since_the_last_log(tmp_path):
    changes = {"learning_rate": 0.0, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    every = trained(distillation_trainer(tmp_path, train=8, arguments_changes=changes))
    once = trained(distillation_trainer(tmp_path, train=8, arguments_changes={**changes, "logging_steps": 4}))
    assert len(curve(once)) == 1 and len(curve(every)) == 4
    whole = distillation_trainer(tmp_path, eval_dataset=rows(8)).evaluate()
    for name in METRICS:
        assert once.state.log_history[0][name] == pytest.approx(whole[f"eval_{name}"], rel=1e-5)
    assert curve(every, "kd").std() > 0


def test_predictions_are_the_student_s_logits(tmp_path):
    data = rows(5)
    trainer = distillation_trainer(tmp_path)
    plain = transformers.Trainer(make_student(), arguments(tmp_path), data_collator=pad)
    got, wanted = trainer.predict(data), plain.predict(data)
    torch.testing.assert_close(torch.tensor(got.predictions), torch.tensor(wanted.predictions), rtol=1e-5, atol=1e-5)
    assert (got.label_ids == wanted.label_ids).all()
    assert got.metrics["test_loss"] == pytest.approx(trainer.evaluate(data)["eval_loss"], rel=1e-6)


def test_compute_metrics_gets_logits_and_labels(tmp_path):
    seen = []

    def accuracy(prediction):
        seen.append(prediction.predictions.shape)
        keep = prediction.label_ids[:, 1:] != -100
        return {"accuracy": (prediction.predictions[:, :-1] == prediction.label_ids[:, 1:])[keep].mean()}

    trainer = distillation_trainer(
        tmp_path, compute_metrics=accuracy, preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1)
    )
    metrics = trainer.evaluate()
    assert seen == [(7, max(len(row["input_ids"]) for row in rows(7, seed=4)))]
    assert 0 <= metrics["eval_accuracy"] <= 1 and metrics["eval_loss"] > 0


def test_resumed_training_equals_one_without_a_break(tmp_path):
    """With dropout, so that the state of the random generators counts; logs of every step, so that metrics are compared, too."""
    changes = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2}
    student = {"attention_dropout": 0.2}
    whole = trained(distillation_trainer(tmp_path / "whole", make_student(**student), arguments_changes=changes))
    torch.manual_seed(99)
    resumed = distillation_trainer(tmp_path / "resumed", tiny_llama(5, **student), arguments_changes=changes)
    trained(resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    names = "loss", "grad_norm", *METRICS
    assert torch.equal(curve(resumed, *names), curve(whole, *names)) and len(curve(resumed)) == 6
    for (name, got), wanted in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(got, wanted), name


def test_checkpoints_hold_the_student_as_from_pretrained_takes_it(tmp_path):
    trainer = trained(distillation_trainer(tmp_path, arguments_changes={"max_steps": 2, "save_strategy": "steps", "save_steps": 2}))
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert type(saved) is transformers.LlamaForCausalLM
    assert_same_weights(saved, trainer.model, rtol=0, atol=0)
    stored = sum(path.stat().st_size for path in (tmp_path / "checkpoint-2").glob("*.safetensors"))
    assert stored < 4 * sum(parameter.numel() for parameter in make_student().parameters()) + 8192
