"""DistillationTrainer against a Trainer whose loss is eager torch, and against Trainer's own loss: the same curves."""

import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_runs import (  # noqa: E402  transformers is there
    EagerTrainer,
    arguments,
    curve,
    distillation_trainer,
    make_student,
    make_teacher,
    pad,
    rows,
    tiny_llama,
    trained,
)

from distill_kernels import autograd, distillation_loss, next_token_labels, reference, run_backbone  # noqa: E402
from distill_kernels.api.trainer import METRICS, DistillationTrainer, forward_replaced  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6")


def eager_trainer(folder, student=None, *, arguments_changes=None, train=13, **options):
    options.setdefault("teacher", make_teacher())
    return EagerTrainer(
        make_student() if student is None else student,
        arguments(folder, **(arguments_changes or {})),
        train_dataset=rows(train),
        data_collator=pad,
        **options,
    )


def assert_same_weights(got, wanted, rtol=1e-5, atol=1e-6):
    wanted = dict(wanted.named_parameters())
    assert wanted
    for name, parameter in got.named_parameters():
        torch.testing.assert_close(parameter, wanted.pop(name), rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    assert not wanted


def assert_same_run(got, wanted, rtol=1e-5):
    torch.testing.assert_close(curve(got), curve(wanted), rtol=rtol, atol=0)
    assert_same_weights(got.model, wanted.model)


# The loss curve


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
    assert curve(got)[-1, 0] < 0.9 * curve(got)[0, 0]


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


# Ways to run it


def test_bfloat16_is_autocast_of_both_models(tmp_path):
    changes = {"bf16": True}
    student, teacher, seen = make_student(), make_teacher(), []
    for model in (student, teacher):
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    got = trained(distillation_trainer(tmp_path, student, teacher_model=teacher, temperature=2.0, ce_weight=0.3, arguments_changes=changes))
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for parameter in got.model.parameters()} == {torch.float32}
    wanted = trained(eager_trainer(tmp_path, temperature=2.0, ce_weight=0.3, arguments_changes=changes))
    exact = trained(eager_trainer(tmp_path, temperature=2.0, ce_weight=0.3))
    # Eager rounds its logits to bfloat16, which the loss does not: it is no further from float32 than eager is, nor from eager than both.
    off = (curve(wanted) - curve(exact)).abs().amax(0)
    assert (off > 0).all()
    assert ((curve(got) - curve(exact)).abs().amax(0) < 2 * off).all()


def test_gradient_checkpointing_recomputes_and_changes_nothing(tmp_path):
    runs, calls = [], []
    for checkpointing in (False, True):
        student = make_student()
        student.model.layers[1].mlp.register_forward_pre_hook(lambda module, inputs, key=checkpointing: calls.append(key))
        runs.append(trained(distillation_trainer(tmp_path, student, arguments_changes={"gradient_checkpointing": checkpointing})))
    assert calls.count(True) == 2 * calls.count(False) > 0
    assert_same_run(*runs)


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

    def recording(problem, tensors, *, run=autograd.run, **options):
        problems.append(problem)
        return run(problem, tensors, **options)

    monkeypatch.setattr(autograd, "run", recording)
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

    def recording(weight, sweep, *, quantise=autograd.quantise):
        quantised.append(tuple(weight.shape))
        return quantise(weight, sweep)

    monkeypatch.setattr(autograd, "quantise", recording)
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


# Adapters


@pytest.mark.parametrize("target_modules", [["q_proj", "down_proj"], ["v_proj", "lm_head"]])
def test_lora_trains_and_saves_the_adapter_alone(tmp_path, target_modules):
    peft = pytest.importorskip("peft")

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


# Evaluation


def oracle(trainer, data):
    """Means over all tokens, from logits in float64."""
    terms, weights = [], []
    options = trainer.loss_options
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


# Checkpoints


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


# The teacher


def test_the_teacher_is_frozen_and_evaluated(tmp_path):
    quiet, noisy = make_teacher(), make_teacher(attention_dropout=0.9).train()
    wanted = trained(distillation_trainer(tmp_path, teacher_model=quiet))
    got = trained(distillation_trainer(tmp_path, teacher_model=noisy))
    assert_same_run(got, wanted)
    assert not noisy.training and not any(parameter.requires_grad for parameter in noisy.parameters())
    assert_same_weights(noisy, make_teacher(), rtol=0, atol=0)
    trained_ones = {id(parameter) for group in got.optimizer.param_groups for parameter in group["params"]}
    assert trained_ones == {id(parameter) for parameter in got.model.parameters()}


def test_a_cache_takes_the_place_of_the_teacher(tmp_path):
    from distill_kernels import TeacherCache, write_teacher_cache

    ids = [row["input_ids"] for row in rows(13)]
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


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temprature": 2.0}, TypeError, "are the loss's: DistillationLoss has no option temprature; its options are divergence,"),
        ({"temperature": -1.0}, ValueError, "temperature must be a finite number above 0"),
        ({"divergence": "unheard_of"}, ValueError, "unheard_of"),
        ({"student_softcap": 3.0}, TypeError, "student_softcap is read from the models"),
        ({"reduction": "sum"}, TypeError, "reduction is set by the Trainer"),
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


def test_vocabularies_may_be_truncated_if_asked_for(tmp_path):
    trainer = trained(distillation_trainer(tmp_path, teacher_model=make_teacher(vocab_size=103), vocab_mismatch="truncate"))
    assert curve(trainer).isfinite().all()


def test_models_that_are_not_known_are_refused_before_training(tmp_path):
    config = transformers.BertConfig(
        vocab_size=101, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
    )
    with pytest.raises(NotImplementedError, match="model_type 'bert'"):
        distillation_trainer(tmp_path, transformers.BertLMHeadModel(config))


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


def test_without_transformers_the_import_says_what_to_install():
    program = "import sys; sys.modules['transformers'] = None; import distill_kernels; from distill_kernels import DistillationTrainer"
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert made.returncode == 1
    assert made.stderr.strip().splitlines()[-1].startswith("ImportError: DistillationTrainer needs transformers and accelerate")
    assert 'pip install "distill_kernels[trainer]"' in made.stderr


def test_it_is_a_trainer_of_transformers():
    assert issubclass(DistillationTrainer, transformers.Trainer)
