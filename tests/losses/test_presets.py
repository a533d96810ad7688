"""Every preset against the package that it is named after, where that runs on a CPU, else against its formula in float64.

Masked labels, biases, and an upstream gradient that is not 1, always. The packages compute in float32, on logits they hold: values and
gradients must agree to 1e-5 of the largest, where a wrong factor, weight or normaliser is off by percents.
"""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from accuracy import make_inputs, make_labels, with_gradients
from document_blocks import ROOT, run_python_blocks
from torch.nn.functional import cross_entropy

import distill_kernels
from distill_kernels import describe_preset, distillation_loss, distillation_loss_and_stats, preset
from distill_kernels.api.losses import presets

UPSTREAM = 1.7
TOKENS, VOCABULARY = 37, 211
INPUTS = make_inputs("moderate", TOKENS, VOCABULARY, 24, 40, bias=True)
LABELS = make_labels(TOKENS, VOCABULARY)
VALID = LABELS != -100


def loaded(package, *path):
    """A module of an installed package, from its own file: importing the package itself would need what it depends on."""
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"{package} is not installed")
    file = Path(found.submodule_search_locations[0], *path)
    spec = importlib.util.spec_from_file_location(f"{package}_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_logits(loss):
    """A loss of student and teacher logits, (N, V), as one of hidden states, heads and biases."""

    def of_hidden(student_hidden, student_weight, teacher_hidden, teacher_weight, *, student_bias, teacher_bias, **options):
        return loss(student_hidden @ student_weight.T + student_bias, teacher_hidden @ teacher_weight.T + teacher_bias, **options)

    return of_hidden


def assert_reproduces(options, theirs, *, difference=0.0, labels=LABELS, inputs=INPUTS, **ours):
    """distillation_loss(**options, **ours) is `theirs` in value, but for `difference`, and in every gradient of the student."""
    got = with_gradients(distillation_loss, inputs, UPSTREAM, labels=labels, **options, **ours)
    want = with_gradients(theirs, inputs, UPSTREAM)
    assert got["loss"].item() + difference == pytest.approx(want["loss"].item(), rel=1e-5)
    assert set(got) == {"loss", "d_student_hidden", "d_student_weight", "d_student_bias"}
    for name in got.keys() - {"loss"}:
        error = (got[name] - want[name]).abs().max().item()
        assert error <= 1e-5 * want[name].abs().max().item(), f"{name} is off by {error:.3g} of {want[name].abs().max():.3g}"


def mean_teacher_entropy(temperature=1.0):
    """Of the valid tokens, as a user would take it: from the stats."""
    _, stats = distillation_loss_and_stats(
        *INPUTS[:4], LABELS, student_bias=INPUTS.student_bias, teacher_bias=INPUTS.teacher_bias, temperature=temperature
    )
    return stats.mean()["teacher_entropy"].item()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    "weights", [{}, {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0}, {"weight_hard_loss": 0.2, "weight_soft_loss": 0.7}]
)
def test_liger_is_its_chunked_loss(beta, temperature, weights):
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    parameters = {"beta": beta, "temperature": temperature, **weights}

    def theirs(student_hidden, student_weight, teacher_hidden, teacher_weight, *, student_bias, teacher_bias):
        loss = chunked_loss.LigerFusedLinearJSDLoss(**parameters, compiled=False, chunk_size=16)
        return loss(student_hidden, student_weight, teacher_hidden, teacher_weight, LABELS, student_bias, teacher_bias)

    assert_reproduces(preset("liger", **parameters), theirs)


def test_liger_ignores_the_index_that_it_is_given():
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    labels = torch.where(VALID, LABELS, 0)

    def theirs(student_hidden, student_weight, teacher_hidden, teacher_weight, *, student_bias, teacher_bias):
        loss = chunked_loss.LigerFusedLinearJSDLoss(ignore_index=0, compiled=False)
        return loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, student_bias, teacher_bias)

    assert_reproduces(preset("liger", ignore_index=0), theirs, labels=labels)


@pytest.mark.parametrize("num_items", [None, 53])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_trl_is_the_kernel_of_its_distillation_trainer(beta, temperature, num_items):
    kernel = pytest.importorskip("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def theirs(student_hidden, student_weight, teacher_hidden, teacher_weight, *, student_bias, teacher_bias):
        divergence, _ = kernel.apply(
            student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, beta, temperature
        )
        return divergence[VALID].sum() / (VALID.sum() if num_items is None else num_items)

    assert_reproduces(preset("trl", beta=beta, temperature=temperature), theirs, num_items=num_items)


def test_trl_defaults_are_its_configuration():
    trl = pytest.importorskip("trl")
    defaults = {name: trl.DistillationConfig.__dataclass_fields__[name].default for name in ("beta", "temperature")}
    assert preset("trl") == preset("trl", **defaults)


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"num_items_in_batch": 53}], ids=["batchmean", "sum", "num_items"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_gkd_is_its_generalized_jsd_loss(beta, temperature, options):
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer

    def theirs(student_logits, teacher_logits):
        return trainer.generalized_jsd_loss(
            student_logits[None], teacher_logits[None], labels=LABELS[None], beta=beta, temperature=temperature, **options
        )

    reduction = {name: value for name, value in options.items() if name == "reduction"}
    num_items = {"num_items": options["num_items_in_batch"]} if "num_items_in_batch" in options else {}
    assert_reproduces(preset("gkd", beta=beta, temperature=temperature, **reduction), on_logits(theirs), **num_items)


def test_gkd_without_labels_divides_by_sequences():
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    inputs = make_inputs("moderate", 36, VOCABULARY, 24, 40, bias=True)
    batch = 4

    def theirs(student_logits, teacher_logits):
        return trainer.generalized_jsd_loss(*(logits.view(batch, 9, VOCABULARY) for logits in (student_logits, teacher_logits)))

    assert_reproduces(preset("gkd"), on_logits(theirs), labels=None, inputs=inputs, num_items=batch)


@pytest.mark.parametrize("kd_ratio", [0.5, 1.0])
@pytest.mark.parametrize(("kd_loss", "parameters", "forward"), [
    ("ForwardKLLoss", {}, 1.0), ("ReverseKLLoss", {}, 0.0), ("SymmetricKLLoss", {}, 0.5), ("SymmetricKLLoss", {"sym_kd_ratio": 0.2}, 0.2),
    ("SymmetricKLLoss", {"sym_kd_ratio": 1.0}, 1.0), ("SymmetricKLLoss", {"sym_kd_ratio": 0.0}, 0.0),
])  # fmt: skip
def test_torchtune_is_its_loss_but_for_the_entropy(kd_loss, parameters, forward, kd_ratio):
    module = loaded("torchtune", "modules", "loss", "kd_losses.py")

    def theirs(student_logits, teacher_logits):
        divergence = getattr(module, kd_loss)(**parameters)(student_logits, teacher_logits, LABELS)
        return (1 - kd_ratio) * cross_entropy(student_logits, LABELS, ignore_index=-100) + kd_ratio * divergence

    difference = kd_ratio * forward * mean_teacher_entropy()
    assert_reproduces(preset("torchtune", kd_loss=kd_loss, kd_ratio=kd_ratio, **parameters), on_logits(theirs), difference=difference)


@pytest.mark.parametrize("kind", ["ForwardKL", "ReverseKL", "SymmetricKL"])
def test_torchtune_has_the_chunked_losses_by_their_configured_names(kind):
    module = loaded("torchtune", "modules", "loss", "kd_losses.py")
    inputs = make_inputs("moderate", 32, VOCABULARY, 24, 40, bias=True)
    labels = make_labels(32, VOCABULARY)

    def theirs(student_logits, teacher_logits):
        chunks = [list(logits.view(2, 16, VOCABULARY).chunk(4, dim=1)) for logits in (student_logits, teacher_logits)]
        loss = getattr(module, f"{kind}WithChunkedOutputLoss")(num_output_chunks=4)
        return loss(*chunks, labels.view(2, 16))

    options = preset("torchtune", kd_loss=f"torchtune.modules.loss.{kind}WithChunkedOutputLoss", kd_ratio=1.0)
    assert options == preset("torchtune", kd_loss=f"{kind}Loss", kd_ratio=1.0)
    log_p = (inputs.teacher_hidden @ inputs.teacher_weight.T + inputs.teacher_bias).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)[labels != -100].mean().item()
    forward = {"ForwardKL": 1.0, "ReverseKL": 0.0, "SymmetricKL": 0.5}[kind]
    assert_reproduces(options, on_logits(theirs), labels=labels, inputs=inputs, difference=forward * entropy)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_modelopt_is_its_loss_and_a_mean(temperature):
    module = loaded("modelopt", "torch", "distill", "losses.py")

    def theirs(student_logits, teacher_logits):
        per_token = module.LogitsDistillationLoss(temperature=temperature, reduction="none")(student_logits, teacher_logits)
        return (per_token * VALID).sum() / VALID.sum()

    assert_reproduces(preset("modelopt", temperature=temperature), on_logits(theirs))


# What no package of the index holds: the papers' and repositories' formulas, in probability space and float64.


def distributions(student_logits, teacher_logits, temperature=1.0):
    """(q, p), float64."""
    return [(logits.double() / temperature).softmax(-1) for logits in (student_logits, teacher_logits)]


def over_valid(per_token):
    return per_token[VALID].sum() / VALID.sum()


DISTILLM = {
    "sfkl": lambda p, q, alpha: -(p * (alpha * p + (1 - alpha) * q).log()).sum(-1),
    "srkl": lambda p, q, alpha: (q * (q / ((1 - alpha) * p + alpha * q)).log()).sum(-1),
    "jsd": lambda p, q, _: (0.1 * p * (p / (0.1 * p + 0.9 * q)).log() + 0.9 * q * (q / (0.1 * p + 0.9 * q)).log()).sum(-1),
    "tvd": lambda p, q, _: 0.5 * (p - q).abs().sum(-1),
    "fkl": lambda p, q, _: -(p * q.log()).sum(-1),
    "rkl": lambda p, q, _: (q * (q / p).log()).sum(-1),
}


@pytest.mark.parametrize(
    ("type", "formula", "parameters", "entropy"),
    [("adaptive-sfkl", "sfkl", {}, 1.0), ("sfkl", "sfkl", {"skew_alpha": 0.3}, 1.0), ("adaptive-srkl", "srkl", {}, 0.0),
     ("srkl", "srkl", {"skew_alpha": 0.3}, 0.0), ("jsd", "jsd", {}, 0.0), ("tvd", "tvd", {}, 0.0), ("kd", "fkl", {}, 1.0),
     ("fkl", "fkl", {}, 1.0), ("rkl", "rkl", {}, 0.0)],
)  # fmt: skip
@pytest.mark.parametrize("kd_ratio", [0.5, 1.0])
def test_distillm_is_its_formula_but_for_the_entropy(type, formula, parameters, entropy, kd_ratio):
    def theirs(student_logits, teacher_logits):
        q, p = distributions(student_logits, teacher_logits)
        divergence = over_valid(DISTILLM[formula](p, q, parameters.get("skew_alpha", 0.1)))
        return (1 - kd_ratio) * cross_entropy(student_logits, LABELS, ignore_index=-100) + kd_ratio * divergence

    difference = kd_ratio * entropy * mean_teacher_entropy()
    assert_reproduces(preset("distillm", type=type, kd_ratio=kd_ratio, **parameters), on_logits(theirs), difference=difference)


@pytest.mark.parametrize("hard_weight", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_hinton_is_the_papers_average_but_for_the_entropy(temperature, hard_weight):
    def theirs(student_logits, teacher_logits):
        q, p = distributions(student_logits, teacher_logits, temperature)
        soft = over_valid(-(p * q.log()).sum(-1)) * temperature**2
        return (1 - hard_weight) * soft + hard_weight * cross_entropy(student_logits.double(), LABELS, ignore_index=-100)

    difference = (1 - hard_weight) * temperature**2 * mean_teacher_entropy(temperature)
    assert_reproduces(preset("hinton", temperature=temperature, hard_weight=hard_weight), on_logits(theirs), difference=difference)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("function", ["kl", "jsd"])
def test_distillkit_is_its_weighted_list(function, temperature):
    def theirs(student_logits, teacher_logits):
        q, p = distributions(student_logits, teacher_logits, temperature)
        m = (p + q) / 2
        jensen_shannon = 0.5 * (p * (p / m).log() + q * (q / m).log()).sum(-1)
        per_token = (p * (p / q).log()).sum(-1) if function == "kl" else jensen_shannon
        hard = cross_entropy(student_logits.double(), LABELS, ignore_index=-100)
        return (3 * temperature**2 * over_valid(per_token) + 1 * hard) / (3 + 1)

    listed = [{"function": "cross_entropy", "weight": 1}, {"function": function, "weight": 3, "temperature": temperature}]
    assert_reproduces(preset("distillkit", loss_functions=listed), on_logits(theirs))
    alone = preset("distillkit", loss_functions=listed[1:])
    assert (alone["kd_weight"], alone["ce_weight"]) == (1.0, 0.0)
    assert preset("distillkit", loss_functions=listed[:1])["kd_weight"] == 0.0


# The function itself


def test_a_preset_is_a_new_dict_of_options_that_the_loss_takes():
    for name, parameters in REQUIRED.items():
        options = preset(name, **parameters)
        assert type(options) is dict and options == preset(name, **parameters) and options is not preset(name, **parameters)
        distill_kernels.DistillationLoss(**options)


REQUIRED = {
    "distillkit": {"loss_functions": [{"function": "kl", "weight": 1, "temperature": 2.0}]},
    "distillm": {"type": "srkl", "kd_ratio": 1.0},
    "gkd": {},
    "hinton": {"temperature": 2.0, "hard_weight": 0.1},
    "liger": {},
    "modelopt": {},
    "torchtune": {},
    "trl": {},
}


def test_every_preset_is_described_and_listed():
    assert set(REQUIRED) == set(presets.CONVENTIONS)
    page = (ROOT / "docs" / "conventions.md").read_text(encoding="utf-8")
    for name in presets.CONVENTIONS:
        text = describe_preset(name)
        assert "Value: " in text and text.startswith(f"preset('{name}'")
        assert f"`{name}`" in page
        for parameter in REQUIRED[name]:
            assert parameter in text
    for name in presets.OUT_OF_REACH:
        assert f"`{name}`" in page


@pytest.mark.parametrize(
    ("name", "parameters", "error", "words"),
    [
        ("ligre", {}, ValueError, "there is no preset 'ligre'; there are distillkit, distillm, gkd"),
        ("minillm", {}, ValueError, "'minillm' cannot be reproduced .* sampled tokens"),
        ("axolotl", {}, ValueError, "most probable tokens"),
        ("liger", {"chunk_size": 1024}, TypeError, "preset 'liger' takes .*weight_hard_loss=0.5.*chunk_size"),
        ("liger", {"beta": 1.5}, ValueError, "beta must be a finite number at least 0 and at most 1, got 1.5"),
        ("trl", {"beta": "0.5"}, TypeError, "beta must be a number, got str"),
        ("trl", {"beta": math.nan}, ValueError, "beta must be a finite number"),
        ("gkd", {"reduction": "mean"}, ValueError, "'batchmean' or 'sum', got 'mean'"),
        ("gkd", {"reduction": "none"}, ValueError, "'batchmean' or 'sum', got 'none'"),
        ("torchtune", {"kd_loss": "JSDLoss"}, ValueError, "ForwardKL.*got 'JSDLoss'"),
        ("torchtune", {"sym_kd_ratio": 0.5}, ValueError, "sym_kd_ratio is a parameter of SymmetricKL"),
        ("torchtune", {"kd_loss": "SymmetricKLLoss", "sym_kd_ratio": 1.5}, ValueError, "sym_kd_ratio must be a finite number"),
        ("torchtune", {"kd_ratio": 2.0}, ValueError, "kd_ratio must be a finite number at least 0 and at most 1"),
        ("distillm", {"type": "srkl"}, TypeError, "kd_ratio"),
        ("distillm", {"type": "kl", "kd_ratio": 0.5}, ValueError, "type must be 'kd' or contain one of sfkl, .* got 'kl'"),
        ("distillm", {"type": "srkl", "kd_ratio": 0.5, "skew_alpha": 0.0}, ValueError, "that limit is 'reverse_kl'"),
        ("hinton", {"temperature": 2.0}, TypeError, "hard_weight"),
        ("hinton", {"temperature": 2.0, "hard_weight": -0.1}, ValueError, "hard_weight must be a finite number at least 0"),
        ("distillkit", {"loss_functions": []}, ValueError, "an entry of a weight above 0"),
        ("distillkit", {"loss_functions": [{"function": "hs_mse", "weight": 1}]}, ValueError, "kl or jsd .* got .*hs_mse"),
        ("distillkit", {"loss_functions": [{"function": "kl", "weight": 1}]}, TypeError, "temperature must be a number"),
        (
            "distillkit",
            {"loss_functions": [{"function": name, "weight": 1, "temperature": 1.0} for name in ("kl", "jsd")]},
            ValueError,
            "jsd is a second divergence",
        ),
        (
            "distillkit",
            {"loss_functions": [{"function": "kl", "weight": 1, "temperature": 1.0, "missing_probability_handling": "zero"}]},
            ValueError,
            "missing_probability_handling",
        ),
    ],
)
def test_what_cannot_be_reproduced_is_said_in_words(name, parameters, error, words):
    with pytest.raises(error, match=words):
        preset(name, **parameters)


def test_python_blocks_of_the_conventions_page_run(capsys):
    ran = run_python_blocks("docs/conventions.md", at_least=2)
    reported = float(capsys.readouterr().out.rpartition("as torchtune reports it:")[2])
    assert reported == pytest.approx((ran["loss"] + 0.5 * ran["stats"].teacher_entropy.mean()).item())
