"""What a trainer does with the columns of its batches: weights, masks, inputs of one of the models, and what nobody reads."""

import pytest
import torch
import transformers
from tiny_models import WORDS, save_llama, tokenizer_of
from trainer_runs import VOCAB, arguments, assert_same_run, curve, distillation_trainer, make_student, make_teacher, pad, rows, trained

from distill_kernels import DistillationTrainer, distillation_loss, next_token_labels, run_backbone
from distill_kernels.api.models.tokenizers import difference
from distill_kernels.api.trainers.batches import MASKS, NOT_READ

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6")
ONE_STEP = {"max_steps": 1, "gradient_accumulation_steps": 1}


def with_column(name, made, padding=0):
    """Rows with one column more, made(row), and a collator that pads it."""
    data = [row | {name: made(row)} for row in rows(13)]

    def padded(batch):
        longest = max(len(row["input_ids"]) for row in batch)
        column = [torch.nn.functional.pad(row[name], (0, longest - len(row[name])), value=padding) for row in batch]
        return pad(batch) | {name: torch.stack(column)}

    return {"train_dataset": data, "data_collator": padded}


def weights_of(row):
    return torch.linspace(0.0, 2.0, len(row["input_ids"]))


@pytest.mark.parametrize("unused", [True, False])
def test_token_weights_multiply_the_loss_of_their_tokens(tmp_path, unused):
    """`unused`: remove_unused_columns, by which a column that no forward takes is dropped."""
    changes = {**ONE_STEP, "remove_unused_columns": unused}
    data = with_column("token_weight", weights_of)
    student, teacher = make_student(), make_teacher()
    batch = data["data_collator"](data["train_dataset"][:2])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = next_token_labels(batch["input_ids"], labels=batch["labels"], attention_mask=batch["attention_mask"])
    of_next = torch.cat([batch["token_weight"][:, 1:], torch.zeros(2, 1)], 1)
    wanted = distillation_loss(
        **run_backbone(student, **inputs).as_student(), **run_backbone(teacher, **inputs).as_teacher(), labels=labels, token_weight=of_next,
        ce_weight=0.5,
    )  # fmt: skip
    trainer = distillation_trainer(tmp_path, student, teacher_model=teacher, ce_weight=0.5, arguments_changes=changes, **data)
    torch.testing.assert_close(trainer.compute_loss(student, batch), wanted, rtol=1e-5, atol=1e-6)
    loss = float(trainer.prediction_step(student, batch, True)[0])
    assert loss == pytest.approx(float(wanted), rel=1e-5)
    weighted = curve(trained(trainer))
    plain = curve(trained(distillation_trainer(tmp_path, ce_weight=0.5, arguments_changes=changes)))
    assert (weighted - plain).abs().min() > 0.01


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_the_tokens_to_learn_from_are_labels(tmp_path, name):
    """As a mask beside labels that have all tokens, and as labels that have some."""
    data = rows(13)
    as_mask = with_column(name, lambda row: (row["labels"] != -100).long())
    for row in as_mask["train_dataset"]:
        row["labels"] = row["input_ids"].clone()
    masked = trained(distillation_trainer(tmp_path, **as_mask))
    assert_same_run(masked, trained(distillation_trainer(tmp_path, train_dataset=data)))


@pytest.mark.parametrize("name", NOT_READ)
def test_columns_that_look_like_weights_and_are_not_read_are_refused(tmp_path, name):
    made = with_column(name, weights_of)
    with pytest.raises(ValueError, match=rf"{name} would change nothing here: wanted .*token_weight.*completion_mask"):
        distillation_trainer(tmp_path, **made).train()


def test_column_of_a_data_set_is_refused_before_training(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([{"input_ids": [1, 2, 3], "loss_weight": [1.0, 1.0, 1.0]}])
    with pytest.raises(ValueError, match="loss_weight would change nothing"):
        distillation_trainer(tmp_path, train_dataset=made)


def test_what_neither_model_takes_is_refused(tmp_path):
    made = with_column("difficulty", weights_of)
    changes = {"remove_unused_columns": False}
    with pytest.raises(ValueError, match=r"the batch has difficulty, which neither .*remove_unused_columns=True"):
        distillation_trainer(tmp_path, arguments_changes=changes, **made).train()
    trained(distillation_trainer(tmp_path, arguments_changes=ONE_STEP, **made | {"data_collator": pad}))  # as the message says


@pytest.mark.parametrize(
    "shape, word", [((2, 3), r"token_weight of the batch is \(2, 3\), wanted"), (None, "token_weight of the batch is list, wanted")]
)
def test_weights_of_another_shape_are_refused(tmp_path, shape, word):
    trainer = distillation_trainer(tmp_path)
    batch = pad(rows(2)) | {"token_weight": [[1.0]] if shape is None else torch.ones(shape)}
    with pytest.raises(ValueError, match=word):
        trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("extra", ["token_weight", "completion_mask"])
def test_shifted_labels_want_no_unshifted_column_beside_them(tmp_path, extra):
    trainer = distillation_trainer(tmp_path)
    batch = pad(rows(2))
    batch |= {"shift_labels": batch.pop("labels"), extra: torch.ones_like(batch["input_ids"])}
    with pytest.raises(ValueError, match="shift_labels and"):
        trainer.compute_loss(trainer.model, batch)


class Shifted(transformers.LlamaForCausalLM):
    """A model that takes an input which others do not."""

    def forward(self, input_ids=None, attention_mask=None, offset=None, **kwargs):
        if offset is None:
            return super().forward(input_ids, attention_mask=attention_mask, **kwargs)
        return super().forward((input_ids + offset) % VOCAB, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_each_model_gets_what_its_own_forward_takes(tmp_path, who):
    """A column that one of them reads and the other does not reaches the one and not the other, whatever Trainer thinks of it."""
    models = {"student": make_student(), "teacher": make_teacher()}
    one = Shifted(models[who].config)
    one.load_state_dict(models[who].state_dict())
    seen = {}

    def body(name, own):
        def forward(input_ids, **inputs):
            seen.setdefault(name, set()).update(inputs)
            inputs.pop("offset", None)
            return own(input_ids, **inputs)

        return forward

    models[who] = one
    for name, model in models.items():
        model.model.forward = body(name, model.model.forward)
    made = with_column("offset", lambda row: torch.ones_like(row["input_ids"]))
    trained(distillation_trainer(tmp_path, models["student"], teacher_model=models["teacher"], arguments_changes=ONE_STEP, **made))
    assert {name for name, inputs in seen.items() if "offset" in inputs} == {who}


# Models as folders, and their tokenizers


def test_folders_are_loaded(tmp_path):
    teacher = save_llama(tmp_path / "teacher", vocabulary=VOCAB, words=WORDS[:90])
    student = save_llama(tmp_path / "student", vocabulary=VOCAB, words=WORDS[:90], layers=2, seed=1)
    transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16).save_pretrained(teacher)
    trainer = distillation_trainer(tmp_path, student, teacher_model=str(teacher), arguments_changes=ONE_STEP)
    assert trainer.teacher_model.dtype is torch.bfloat16 and trainer.model.dtype is torch.float32
    assert trained(trainer).state.global_step == 1


@pytest.mark.parametrize("given", [{"teacher_model": ["a"]}, {"model": 3}])
def test_what_is_no_model_is_refused_in_words(tmp_path, given):
    (name,) = given
    with pytest.raises(TypeError, match=f"{name} is .*wanted a causal language model of transformers, or its local folder"):
        DistillationTrainer(**{"model": make_student(), "teacher_model": make_teacher(), "args": arguments(tmp_path)} | given)


def test_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        distillation_trainer(tmp_path, teacher_model="nowhere")


OTHERS = ["other", *WORDS[1:]]


@pytest.mark.parametrize("known_by", ["processing_class", "folder"])
def test_tokenizers_of_one_size_that_differ_are_refused(tmp_path, known_by):
    teacher = save_llama(tmp_path / "teacher")
    student = save_llama(tmp_path / "student", words=OTHERS, layers=2, seed=1)
    options = {"processing_class": tokenizer_of(OTHERS)} if known_by == "processing_class" else {}
    model = make_student(vocab_size=300) if options else str(student)
    with pytest.raises(ValueError, match=r"tokenizers of teacher and student differ in 1 tokens .*'ban'.*'other'"):
        distillation_trainer(tmp_path, model, teacher_model=str(teacher), **options)
    same = {"processing_class": tokenizer_of(WORDS)} if options else {}
    distillation_trainer(tmp_path, make_student(vocab_size=300), teacher_model=str(teacher), **same)


def test_tokens_that_only_one_tokenizer_has_are_no_contradiction():
    few, more = tokenizer_of(WORDS[:100]), tokenizer_of(WORDS)
    assert difference(few, more) is None and difference(more, few) is None
    assert "differ in 2 tokens" in difference(more, tokenizer_of([*WORDS[:3], WORDS[4], WORDS[3]]))
    assert difference(more, tokenizer_of([*WORDS[:3], WORDS[4], WORDS[3]]), shared=3) is None
