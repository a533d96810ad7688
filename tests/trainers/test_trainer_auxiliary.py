"""Students with losses of their own beside cross entropy, which every trainer adds by the student's coefficient, and logs."""

import pytest
import torch
from test_trl import FusedDistillation, FusedGKD, distillation_batch, gkd_batch, loss_and_gradients
from trainer_runs import VOCAB, arguments, curve, distillation_trainer, make_teacher, pad, rows, trained
from transformers import Trainer
from trl_runs import VOCABULARY, distillation, gkd

from benchmarks.models.tiny import tiny_model
from distill_kernels.api.models.backbone import run_backbone
from distill_kernels.api.runs import loop

pytestmark = pytest.mark.filterwarnings("ignore")  # trl and transformers deprecate each other


def mixture(coefficient, model_type="qwen3_moe", vocabulary=VOCAB):
    return tiny_model(model_type, vocab_size=vocabulary, output_router_logits=True, router_aux_loss_coef=coefficient).train()


def plain(folder, student, **changes):
    return Trainer(student, arguments(folder, **changes), train_dataset=rows(13), eval_dataset=rows(7, seed=4), data_collator=pad)


@pytest.mark.parametrize("coefficient", [0.0, 5.0])
@pytest.mark.parametrize("model_type", ["qwen3_moe", pytest.param("olmoe", marks=pytest.mark.exhaustive), "mixtral"])
def test_fine_tuning_is_that_of_a_plain_trainer(tmp_path, coefficient, model_type):
    changes = {"gradient_accumulation_steps": 1, "learning_rate": 1e-3, "max_steps": 3}
    wanted = trained(plain(tmp_path, mixture(coefficient, model_type), **changes))
    got = trained(
        distillation_trainer(
            tmp_path, mixture(coefficient, model_type), arguments_changes=changes, teacher_model=None, kd_weight=0.0, ce_weight=1.0
        )
    )
    torch.testing.assert_close(curve(got), curve(wanted), rtol=5e-5, atol=0)
    logged = curve(got, "loss", "ce", "router_aux_loss")
    torch.testing.assert_close(logged[:, 0], logged[:, 1] + coefficient * logged[:, 2], rtol=1e-5, atol=0)


def test_accumulated_batches_have_the_mean_of_their_auxiliary_losses(tmp_path):
    """As of one batch of their size, and not, as a plain Trainer has it, the sum, which grows with the number of batches."""
    coefficient, changes = 5.0, {"gradient_accumulation_steps": 3, "max_steps": 1, "learning_rate": 0.0}
    student, teacher = mixture(coefficient), make_teacher()
    trainer = distillation_trainer(
        tmp_path, student, arguments_changes=changes, teacher_model=teacher, train_dataset=[rows(1, seed=5)[0]] * 6
    )  # six equal rows, so that the mean over tokens, which is logged, is that over batches
    (loss, kd, own) = curve(trained(trainer), "loss", "kd", "router_aux_loss")[0]
    with torch.no_grad():
        wanted = run_backbone(student, **{name: column for name, column in pad(rows(1, seed=5) * 2).items() if name != "labels"})
    torch.testing.assert_close(own.float(), wanted.auxiliary["router_aux_loss"].value, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, kd + coefficient * own, rtol=1e-5, atol=0)


def test_evaluations_have_them_too(tmp_path):
    trainer = distillation_trainer(tmp_path, mixture(5.0), temperature=2.0)
    metrics = trainer.evaluate()
    assert metrics["eval_router_aux_loss"] > 1
    assert metrics["eval_loss"] == pytest.approx(4 * metrics["eval_kd"] + 5.0 * metrics["eval_router_aux_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["gkd", "distillation"])
def test_trl_s_trainers_add_them(tmp_path, kind):
    make, trainer, batch = {"gkd": (gkd, FusedGKD, gkd_batch()), "distillation": (distillation, FusedDistillation, distillation_batch())}[
        kind
    ]
    made = {}
    for coefficient in (1.0, 5.0):
        own = make(trainer, tmp_path, student=mixture(coefficient, vocabulary=VOCABULARY))
        loss, gradients = loss_and_gradients(own, batch, 40)
        made[coefficient] = loss, gradients, own._metrics["train"]["router_aux_loss"]
    (less, _, logged), (added, gradients, same) = made.values()
    assert logged == same
    assert added.item() - less.item() == pytest.approx(4.0 * logged[0], rel=1e-5)
    routers = [name for name in gradients if name.endswith("mlp.gate.weight")]
    assert all((gradients[name] - made[1.0][1][name]).abs().max() > 1e-3 for name in routers)
    assert routers
    if kind == "gkd":  # whose arguments have a coefficient, which is over the model's
        own = make(trainer, tmp_path, student=mixture(1.0, vocabulary=VOCABULARY), router_aux_loss_coef=5.0)
        torch.testing.assert_close(loss_and_gradients(own, batch, 40)[0], added)


def test_the_loop_of_the_command_line_adds_them():
    ids = torch.randint(VOCAB, (6, 8), generator=torch.Generator().manual_seed(0))
    text = loop.TaughtText(ids, model=make_teacher().eval())
    made = {}
    for coefficient, at_once in ((0.0, None), (5.0, None), (5.0, 3)):
        student = mixture(coefficient).eval()
        made[coefficient, at_once] = next(
            iter(loop.train(student, text, torch.arange(6)[None], *loop.optimizer_and_schedule(student, 0.0, 1), at_once=at_once))
        )
    own = made[5.0, None]["router_aux_loss"]
    assert own == made[0.0, None]["router_aux_loss"] > 1
    assert made[5.0, None]["loss"] == pytest.approx(made[0.0, None]["loss"] + 5.0 * own, rel=1e-5)
    halves = [
        run_backbone(mixture(5.0).eval(), input_ids=ids[part]).auxiliary["router_aux_loss"].value.item() for part in (slice(3), slice(3, 6))
    ]
    assert made[5.0, 3]["router_aux_loss"] == pytest.approx(sum(halves) / 2, rel=1e-5)
