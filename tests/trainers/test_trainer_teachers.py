"""The teacher of a DistillationTrainer, live or cached, and what is refused before training."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from trainer_runs import (
    VOCAB,
    assert_same_run,
    assert_same_weights,
    curve,
    distillation_trainer,
    make_student,
    make_teacher,
    pad,
    rows,
    trained,
)

from benchmarks.models.tiny import tiny_model
from distill_kernels import TeacherCache, distillation_loss, divergences, next_token_labels, preset, write_teacher_cache
from distill_kernels.api.trainers.distillation_trainer import check_parallelism
from distill_kernels.api.trainers.trainer_loss import METRICS

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6")


def test_the_teacher_is_frozen_and_evaluated(tmp_path):
    quiet, noisy = make_teacher(), make_teacher(attention_dropout=0.9).train()
    wanted = trained(distillation_trainer(tmp_path, teacher_model=quiet))
    got = trained(distillation_trainer(tmp_path, teacher_model=noisy))
    assert_same_run(got, wanted)
    assert not noisy.training and not any(parameter.requires_grad for parameter in noisy.parameters())
    assert_same_weights(noisy, make_teacher(), rtol=0, atol=0)
    trained_ones = {id(parameter) for group in got.optimizer.param_groups for parameter in group["params"]}
    assert trained_ones == {id(parameter) for parameter in got.model.parameters()}


def inputs_of(count):
    return [row["input_ids"] for row in rows(count)]


def test_a_cache_takes_the_place_of_the_teacher(tmp_path):
    ids = inputs_of(13)
    write_teacher_cache(make_teacher().eval(), ids, tmp_path / "cache", kind="hidden", dtype="float32")
    cache = TeacherCache.open(tmp_path / "cache")
    live = trained(distillation_trainer(tmp_path, temperature=2.0, ce_weight=0.3))
    options = {"teacher_model": None, "teacher_cache": cache, "temperature": 2.0, "ce_weight": 0.3}
    found = trained(distillation_trainer(tmp_path, eval_dataset=rows(13), **options))
    assert_same_run(found, live)

    whole = [{"input_ids": row, "labels": row} for row in ids]
    live = trained(distillation_trainer(tmp_path, train_dataset=whole, temperature=2.0, ce_weight=0.3))
    brought = trained(distillation_trainer(tmp_path, train_dataset=cache.dataset(), data_collator=None, **options))
    assert_same_run(brought, live)
    with pytest.raises(Exception, match=r"row 0 of the batch, .* is in no row of"):
        found.evaluate(rows(2, seed=77))


def test_a_cache_of_all_log_probabilities_takes_the_place_of_the_teacher(tmp_path):
    write_teacher_cache(make_teacher().eval(), inputs_of(13), tmp_path / "cache", kind="top-k", top_k=VOCAB, temperature=2.0)
    cache = TeacherCache.open(tmp_path / "cache")
    live = trained(distillation_trainer(tmp_path, temperature=2.0, ce_weight=0.3))
    listed = trained(distillation_trainer(tmp_path, teacher_model=None, teacher_cache=cache, tail="ignore", ce_weight=0.3))
    assert_same_run(listed, live, rtol=1e-4)
    assert not METRICS.keys() & listed.state.log_history[0].keys()


def test_a_cache_of_few_log_probabilities_is_a_bucket(tmp_path):
    """5 of 101 tokens, and the mass of the others as one outcome, by evaluation and by a step of training."""
    write_teacher_cache(make_teacher().eval(), inputs_of(13), tmp_path / "cache", kind="top-k", top_k=5, temperature=2.0)
    cache = TeacherCache.open(tmp_path / "cache")
    data, teacher, student, total, count = rows(13), make_teacher().eval(), make_student().eval(), 0.0, 0
    for row in data:
        with torch.no_grad():
            p, q = ((model(row["input_ids"][None]).logits[0, :-1].double() / 2).softmax(-1) for model in (teacher, student))
        top, ids = p.topk(5)
        p, q = (torch.cat((listed, 1 - listed.sum(-1, keepdim=True)), -1) for listed in (top, q.gather(-1, ids)))
        keep = row["labels"][1:] != -100
        total, count = total + 4 * (p * (p / q).log()).sum(-1)[keep].sum().item(), count + int(keep.sum())
    changes = {"per_device_train_batch_size": 13, "gradient_accumulation_steps": 1, "max_steps": 1}
    trainer = distillation_trainer(
        tmp_path, teacher_model=None, teacher_cache=cache, eval_dataset=data, tail="bucket", arguments_changes=changes
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert curve(trained(trainer), "loss").item() == pytest.approx(total / count, rel=1e-4)
    for options, error, message in (
        ({}, TypeError, 'a top-k cache wants tail="bucket"'),
        ({"tail": "bucket", "temperature": 1.0}, ValueError, "teacher_logprobs are of temperature 2 and the loss is of 1"),
        ({"tail": "bucket", "column_fraction": 0.1}, TypeError, "has no option column_fraction"),
        ({"tail": "bucket", "ce_weight": -1.0}, ValueError, "ce_weight must be"),
        ({"tail": "bucket", "teacher_temperature": 1.0}, TypeError, "teacher_temperature is read from the cache"),
    ):
        with pytest.raises(error, match=message):
            distillation_trainer(tmp_path, teacher_model=None, teacher_cache=cache, **options)
    renormalised = trained(distillation_trainer(tmp_path, teacher_model=None, teacher_cache=cache, tail="renormalise", temperature=1.0))
    assert curve(renormalised).isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temprature": 2.0}, TypeError, "are the loss's: the loss has no option temprature; its options are divergence,"),
        ({"temperature": -1.0}, ValueError, "temperature must be a finite number above 0"),
        ({"divergence": "unheard_of"}, ValueError, "unheard_of"),
        ({"student_softcap": 3.0}, TypeError, "student_softcap is read from the models"),
        ({"reduction": "sum"}, ValueError, "reduction must be 'mean' in a Trainer, got 'sum'"),
        ({"sequence_parallel": True}, ValueError, "sequence_parallel must be False in a Trainer, got True"),
        ({"ignore_index": 0}, ValueError, "ignore_index must be -100 in a Trainer, got 0"),
        ({"teacher_model": None}, TypeError, "teacher_model and teacher_cache are missing"),
        ({"teacher_model": "student"}, ValueError, "shares parameters that are trained with the student"),
        ({"teacher_model": make_teacher(vocab_size=103)}, ValueError, "the student's LM head has 101 rows but the teacher's has 103"),
        ({"compute_loss_func": distillation_loss}, ValueError, "compute_loss_func takes logits"),
        ({"arguments_changes": {"use_liger_kernel": True}}, ValueError, "use_liger_kernel replaces"),
        ({"arguments_changes": {"label_smoothing_factor": 0.1}}, ValueError, "label_smoothing_factor is 0.1, .* but ce_weight is 0"),
        (
            {"arguments_changes": {"label_smoothing_factor": 0.1}, "ce_weight": 1.0, "label_smoothing": 0.2},
            ValueError,
            "label_smoothing is 0.2 but args.label_smoothing_factor is 0.1",
        ),
    ],
)
def test_bad_options_are_refused_before_training(tmp_path, options, error, message):
    student = make_student()
    if options.get("teacher_model") == "student":
        options = {**options, "teacher_model": student}
    with pytest.raises(error, match=message):
        distillation_trainer(tmp_path, student, **options)


def test_presets_are_options(tmp_path):
    by_name = trained(distillation_trainer(tmp_path, **preset("gkd", beta=0.1)))
    by_hand = trained(distillation_trainer(tmp_path, divergence=divergences.jensen_shannon(beta=0.1), temperature_squared=False))
    assert_same_run(by_name, by_hand, rtol=0)
    distillation_trainer(tmp_path, **preset("liger"))


def test_vocabularies_may_be_truncated_if_asked_for(tmp_path):
    trainer = trained(distillation_trainer(tmp_path, teacher_model=make_teacher(vocab_size=103), vocab_mismatch="truncate"))
    assert curve(trainer).isfinite().all()


def with_added_tokens(trainer):
    """A batch of which some tokens are the student's own, and the loss by hand: the teacher reads token 3 there."""
    batch = pad(rows(4))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ids[:2, 8] = batch["labels"][:2, 8] = VOCAB + 2
    labels = next_token_labels(ids, labels=batch["labels"], attention_mask=mask)
    assert (labels >= VOCAB).any()
    student, teacher = trainer.model, trainer.teacher_model
    z = student(input_ids=ids, attention_mask=mask).logits.double()
    y = teacher(input_ids=torch.where(ids >= VOCAB, 3, ids), attention_mask=mask).logits.double()
    log_q, log_p = z[..., :VOCAB].log_softmax(-1), y.log_softmax(-1)
    valid = labels != -100
    kd = (log_p.exp() * (log_p - log_q)).sum(-1)[valid].mean()
    return batch, kd + 0.5 * torch.nn.functional.cross_entropy(z[valid], labels[valid])


def test_student_with_added_tokens_learns_them_and_the_teacher_reads_another_in_their_place(tmp_path):
    options = {"vocab_mismatch": "truncate", "ce_weight": 0.5}
    student = make_student(vocab_size=VOCAB + 5)
    trainer = distillation_trainer(tmp_path, student, **options)
    batch, _ = with_added_tokens(trainer)
    with pytest.raises(ValueError, match=rf"has token 10\d, but the teacher reads {VOCAB} tokens only; pass teacher_stand_in_id="):
        trainer.compute_loss(student, batch)
    trainer = distillation_trainer(tmp_path, student, teacher_stand_in_id=3, **options)
    batch, wanted = with_added_tokens(trainer)
    got = trainer.compute_loss(student, batch)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(loss, student.lm_head.weight, retain_graph=True)[0] for loss in (got, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert gradients[0][VOCAB:].abs().min(1).values.max() > 0
    with pytest.raises(ValueError, match=f"teacher_stand_in_id is {VOCAB}, wanted a token that the teacher has: 0 to {VOCAB - 1}"):
        distillation_trainer(tmp_path, student, teacher_stand_in_id=VOCAB, **options)


def test_models_that_are_not_known_are_refused_before_training(tmp_path):
    with pytest.raises(NotImplementedError, match="model_type 'prophetnet'"):
        distillation_trainer(tmp_path, tiny_model("prophetnet"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_gpu": 2}, "DataParallel over 2 devices is not supported; start one process for each"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "tp_size=2, but the loss needs whole rows and a whole head"),
        ({"parallelism_config": ParallelismConfig(cp_size=4)}, "cp_size=4"),
        ({"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=1)}, "FSDP of version 1 is not supported"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, "ZeRO-3 keeps the LM head in shards"),
    ],
)
def test_parallelism_that_splits_the_head_or_the_rows_is_refused(changes, message):
    """What a Trainer would have that was started so; it cannot be on a CPU."""
    plugins = {"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=2), "deepspeed_plugin": SimpleNamespace(zero_stage=2)}

    def trainer(n_gpu=1, parallelism_config=None, **changed):
        accelerator = SimpleNamespace(parallelism_config=parallelism_config, state=SimpleNamespace(**{**plugins, **changed}))
        return SimpleNamespace(args=SimpleNamespace(n_gpu=n_gpu), accelerator=accelerator, is_fsdp_enabled=True, is_deepspeed_enabled=True)

    check_parallelism(trainer())
    with pytest.raises(NotImplementedError, match=message):
        check_parallelism(trainer(**changes))


def test_without_transformers_the_import_says_what_to_install():
    program = "import sys; sys.modules['transformers'] = None; import distill_kernels; from distill_kernels import DistillationTrainer"
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert made.returncode == 1
    assert made.stderr.strip().splitlines()[-1].startswith("ImportError: DistillationTrainer needs transformers and accelerate")
    assert 'pip install "distill_kernels[trainer]"' in made.stderr
