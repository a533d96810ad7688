"""DistillationTrainer against a Trainer whose loss is eager torch, and against Trainer's own loss: the same curves."""

import peft
import pytest
import torch
import transformers
from document_blocks import run_python_blocks
from trainer_runs import (
    VOCAB,
    arguments,
    assert_same_run,
    assert_same_weights,
    curve,
    distillation_trainer,
    eager_trainer,
    make_student,
    make_teacher,
    pad,
    rows,
    trained,
)

from benchmarks.models.tiny import tiny_model
from distill_kernels import reference
from distill_kernels.api.trainers.distillation_trainer import forward_replaced
from distill_kernels.api.trainers.trainer_loss import METRICS
from distill_kernels.ops import whole_vocabulary

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6")


@pytest.mark.parametrize("tied", [False, True])
def test_training_equals_eager_torch(tmp_path, tied):
    """Nine steps over rows of many lengths, a last step of each epoch with fewer batches, a last batch with fewer rows, a schedule."""
    changes = {"max_steps": -1, "num_train_epochs": 3, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    options = {"temperature": 2.0, "ce_weight": 0.3}
    student = [make_student(tie_word_embeddings=tied) for _ in range(2)]
    got = trained(distillation_trainer(tmp_path, student[0], train=11, arguments_changes=changes, **options))
    wanted = trained(eager_trainer(tmp_path, student[1], train=11, arguments_changes=changes, **options))
    assert len(curve(got)) == 9
    assert_same_run(got, wanted)
    loss, kd, ce = curve(got, "loss", "kd", "ce").T
    torch.testing.assert_close(4 * kd + 0.3 * ce, loss, rtol=1e-4, atol=0)  # transformers 4 logs four decimals of the loss
    assert curve(got)[-3:, 0].mean() < 0.95 * curve(got)[:3, 0].mean()


def test_without_a_teacher_training_equals_trainer_s_own_loss(tmp_path):
    """Cross entropy alone is what the model computes by itself, smoothed by Trainer's own class for it."""
    for smoothing in (0.0, 0.2):
        changes = {"label_smoothing_factor": smoothing}
        got = trained(distillation_trainer(tmp_path, teacher_model=None, kd_weight=0.0, ce_weight=1.0, arguments_changes=changes))
        plain = transformers.Trainer(make_student(), arguments(tmp_path, **changes), train_dataset=rows(13), data_collator=pad)
        assert_same_run(got, trained(plain))
        metrics = {"kd", "top1_agreement", "teacher_entropy"} & got.state.log_history[0].keys()
        assert not metrics and "ce" in got.state.log_history[0]


def test_label_smoothing_joins_the_divergence(tmp_path):
    got = trained(distillation_trainer(tmp_path, ce_weight=0.7, arguments_changes={"label_smoothing_factor": 0.2}))
    assert_same_run(got, trained(eager_trainer(tmp_path, ce_weight=0.7, label_smoothing=0.2)))


def test_accumulated_batches_equal_one_batch(tmp_path):
    one = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    four = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    runs = [trained(distillation_trainer(tmp_path, ce_weight=0.3, arguments_changes=changes)) for changes in (one, four)]
    assert_same_run(*runs)
    torch.testing.assert_close(curve(runs[0], *METRICS), curve(runs[1], *METRICS), rtol=1e-5, atol=1e-7)


def test_packed_rows_equal_padded_ones(tmp_path):
    """Documents one after the other in a single row, told apart by position_ids, without labels that say where they begin."""

    def pack(batch):
        ids, labels = (torch.cat([row[name] for row in batch])[None] for name in ("input_ids", "labels"))
        return {"input_ids": ids, "labels": labels, "position_ids": torch.cat([torch.arange(len(row["labels"])) for row in batch])[None]}

    flatten = transformers.DataCollatorWithFlattening(return_tensors="pt")

    def flattened(batch):
        return flatten([{name: column.tolist() for name, column in row.items()} for row in batch])

    padded, *packed = (
        trained(distillation_trainer(tmp_path, data_collator=collate, temperature=2.0)) for collate in (pad, pack, flattened)
    )
    for run in packed:
        assert_same_run(run, padded)
        assert run.evaluate()["eval_loss"] == pytest.approx(padded.evaluate()["eval_loss"], rel=1e-5)


def test_rows_without_labels_are_learned_from_whole(tmp_path):
    """Padding aside, which attention_mask tells; the count that normalises is of the same tokens."""
    whole = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows(13)]

    def unlabelled(batch):
        made = pad(batch)
        del made["labels"]
        return made

    runs = [
        trained(distillation_trainer(tmp_path, train_dataset=whole, data_collator=collate, ce_weight=0.3)) for collate in (pad, unlabelled)
    ]
    assert_same_run(*runs)


def test_a_step_without_a_target_is_0_and_not_nan(tmp_path):
    masked = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows(8)]
    trainer = trained(distillation_trainer(tmp_path, train_dataset=masked, eval_dataset=masked, arguments_changes={"max_steps": 1}))
    assert curve(trainer).tolist() == [[0, 0]]
    assert_same_weights(trainer.model, make_student())
    assert trainer.evaluate()["eval_loss"] == 0


def test_bfloat16_is_autocast_of_both_models(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # where transformers 4 leaves bf16 for all Trainers to come
    # Steps so small that every one of them sees the first weights: large ones would carry on, and increase, what two roundings differ by.
    slow = {"learning_rate": 1e-6}
    options = {"temperature": 2.0, "ce_weight": 0.3}
    exact = trained(eager_trainer(tmp_path, arguments_changes=slow, **options))
    options["arguments_changes"] = slow | {"bf16": True}
    wanted = trained(eager_trainer(tmp_path, **options))
    student, teacher, seen, calls = make_student(), make_teacher(), [], []

    def recording(problem, tensors, run=whole_vocabulary.run):
        results = run(problem, tensors)
        calls.append((tensors, results.terms.detach()))
        return results

    monkeypatch.setattr(whole_vocabulary, "run", recording)
    trainer = distillation_trainer(tmp_path, student, teacher_model=teacher, **options)
    for model in (student, teacher):
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    got = trained(trainer)
    assert set(seen) == {torch.bfloat16}
    for tensors, terms in calls:
        # The loss is of the bfloat16 states and heads as they are, in float32.
        assert {tensor.dtype for tensor in (*tensors[:2], *tensors[3:5])} == {torch.bfloat16}
        counts = (tensors.coefficients != 0).any(-1)
        hidden = [states[counts].detach() for states in (tensors.student_hidden, tensors.teacher_hidden)]
        heads = [head.detach() for head in (tensors.student_weight, tensors.teacher_weight)]
        (kd, ce, _), _ = reference.distillation_terms(hidden[0], heads[0], hidden[1], heads[1], tensors.labels[counts], temperature=2.0)
        for term, truth in zip(terms[counts].T, (kd, ce), strict=False):
            torch.testing.assert_close(term.double(), truth, rtol=0, atol=8 * 2.0**-23 * truth.abs().max().item())
    assert {parameter.dtype for parameter in got.model.parameters()} == {torch.float32}
    # Both have the same hidden states. Eager rounds its logits to bfloat16, each by 2⁻⁹ of it at the most; δ is that
    # of the largest logit, z. A log-probability, of a logit and the log-sum-exp, is off by 2·δ, and the cross entropy is one of them. In
    # Σ p·(log p − log q) two are weighted by p, which itself is off by 2·δ of it and weighs a difference of 4·z at the most. The divergence
    # is of logits that τ = 2 divides, and counts τ² = 4 times.
    with torch.no_grad():
        z = max(model(row["input_ids"][None]).logits.abs().max().item() for model in (make_student(), make_teacher()) for row in rows(13))
    delta = 2.0**-9 * z
    bound = 4 * (4 * delta / 2 + 2 * (delta / 2) * (4 * z / 2)) + 0.3 * 2 * delta
    losses, norms = (torch.stack([curve(run)[:, i] for run in (got, wanted, exact)]) for i in range(2))
    assert (losses[0] != losses[1]).any() and ((losses[0] - losses[1]).abs() <= bound).all()
    # To float32 the models' own roundings come in: of a tensor by 2⁻⁹ of it, at some 20 places forward and as many backward, each of which
    # a norm may feel in full.
    assert ((losses[0] / losses[2] - 1).abs() <= 40 * 2.0**-9).all() and ((norms / norms[2] - 1).abs() <= 40 * 2.0**-9).all()


def test_gradient_checkpointing_recomputes_and_changes_nothing(tmp_path):
    runs, calls = [], []
    for checkpointing in (False, True):
        student = make_student()
        trainer = distillation_trainer(tmp_path, student, arguments_changes={"gradient_checkpointing": checkpointing})
        student.model.layers[1].mlp.register_forward_pre_hook(lambda module, inputs, key=checkpointing: calls.append(key))
        runs.append(trained(trainer))
    assert calls.count(True) == 2 * calls.count(False) > 0
    assert_same_run(*runs)


@pytest.mark.parametrize(("who", "changes"), [("teacher", {}), ("student", {"torch_compile": True, "torch_compile_backend": "eager"})])
def test_packed_rows_that_see_each_other_are_refused_in_the_first_step(tmp_path, who, changes):
    """Whichever of the models it is; the student's compiled forward could not tell."""
    models = {"student": make_student(), "teacher": make_teacher()} | {who: tiny_model("bloom", vocab_size=VOCAB)}
    trainer = distillation_trainer(
        tmp_path, models["student"], teacher_model=models["teacher"], arguments_changes=changes,
        data_collator=transformers.DataCollatorWithFlattening(return_tensors="pt"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"BloomForCausalLM, .*, does not keep documents apart.*Pad instead"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_compiled_training_is_one_graph_and_the_same(tmp_path):
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()

    def same_length(batch):  # a length of its own for each batch would be a graph of its own
        return {
            name: torch.nn.functional.pad(column, (0, 12 - column.shape[1]), value=-100 if name == "labels" else 0)
            for name, column in pad(batch).items()
        }

    options = {"data_collator": same_length, "train": 16, "evaluation": 8, "temperature": 2.0, "ce_weight": 0.3}
    changes = {"torch_compile": True, "torch_compile_backend": "eager"}
    compiled = trained(distillation_trainer(tmp_path, arguments_changes=changes, **options))
    assert dict(counters["graph_break"]) == {}
    assert counters["stats"]["unique_graphs"] == 1
    plain = trained(distillation_trainer(tmp_path, **options))
    assert_same_run(compiled, plain)

    # After training Trainer evaluates the student as it is; before, it compiles it.
    evaluated = distillation_trainer(tmp_path, arguments_changes=changes, **options).evaluate()
    assert evaluated["eval_loss"] == pytest.approx(distillation_trainer(tmp_path, **options).evaluate()["eval_loss"], rel=1e-5)
    assert dict(counters["graph_break"]) == {}
    assert counters["stats"]["unique_graphs"] == 2


def test_a_frozen_head_gets_no_gradient(tmp_path, monkeypatch):
    problems = []

    def recording(problem, tensors, *, run=whole_vocabulary.run, **options):
        problems.append(problem)
        return run(problem, tensors, **options)

    monkeypatch.setattr(whole_vocabulary, "run", recording)
    student = make_student()
    student.lm_head.requires_grad_(False)
    trainer = trained(distillation_trainer(tmp_path, student))
    assert {(problem.d_hidden, problem.d_weight) for problem in problems} == {(True, False)}
    assert torch.equal(student.lm_head.weight, make_student().lm_head.weight)
    eager = make_student()
    eager.lm_head.requires_grad_(False)
    assert_same_run(trainer, trained(eager_trainer(tmp_path, eager)))


def test_sampled_columns_and_a_quantised_sweep(tmp_path, monkeypatch):
    """The teacher's head is quantised once for all steps; what is learned is nearly the same."""
    vocabulary, quantised = 8200, []

    def recording(weight, sweep, *, quantise=whole_vocabulary.quantise):
        quantised.append(tuple(weight.shape))
        return quantise(weight, sweep)

    monkeypatch.setattr(whole_vocabulary, "quantise", recording)
    runs = []
    for options in ({}, {"column_fraction": 0.3, "sweep": "int8"}):
        student, teacher = make_student(vocab_size=vocabulary), make_teacher(vocab_size=vocabulary)
        changes = {"per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "max_steps": 2}
        data = rows(64, vocabulary=vocabulary)
        runs.append(
            trained(
                distillation_trainer(tmp_path, student, teacher_model=teacher, train_dataset=data, arguments_changes=changes, **options)
            )
        )
    exact, sampled = runs
    assert quantised.count((vocabulary, 24)) == 1 and quantised.count((vocabulary, 16)) == 2
    losses = curve(exact)[:, 0], curve(sampled)[:, 0]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)
    assert not torch.equal(*losses)


@pytest.mark.parametrize("target_modules", [["q_proj", "down_proj"], ["v_proj", "lm_head"]])
def test_lora_trains_and_saves_the_adapter_alone(tmp_path, target_modules):
    def adapted():
        config = peft.LoraConfig(r=2, target_modules=target_modules, task_type="CAUSAL_LM", lora_dropout=0.1)
        return peft.get_peft_model(make_student(), config)

    options = {"temperature": 2.0, "ce_weight": 0.3}
    got = trained(distillation_trainer(tmp_path / "got", adapted(), **options))
    wanted = trained(eager_trainer(tmp_path / "wanted", adapted(), **options))
    assert_same_run(got, wanted)
    moved = [name for name, parameter in got.model.named_parameters() if not torch.equal(parameter, adapted().get_parameter(name))]
    assert moved and all("lora_" in name for name in moved)

    got.save_model(str(tmp_path / "saved"))
    assert "model.safetensors" not in {path.name for path in (tmp_path / "saved").iterdir()}
    reloaded = peft.PeftModel.from_pretrained(make_student(), str(tmp_path / "saved")).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, got.model.eval()(ids).logits)
        assert not torch.allclose(reloaded(ids).logits, make_student()(ids).logits, atol=1e-3)


def test_a_replaced_forward_is_put_back():
    model = make_student()
    own = lambda: "own"  # noqa: E731
    for before in (None, own):
        if before is not None:
            model.forward = before
        with pytest.raises(ZeroDivisionError), forward_replaced(model, lambda module: module):
            assert model() is model
            raise ZeroDivisionError
        assert model.__dict__.get("forward") is before


def test_documentation_runs(tmp_path, monkeypatch, capsys):
    """docs/trainer.md, from top to bottom."""
    monkeypatch.chdir(tmp_path)
    namespace = run_python_blocks("docs/trainer.md", at_least=6)
    assert_same_weights(namespace["saved"], namespace["offline"].model, rtol=0, atol=0)
    kd = [entry["kd"] for entry in namespace["logged"]]
    assert kd[-1] < kd[0] and capsys.readouterr().out.count("eval_kd") >= 2
