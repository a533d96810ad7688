"""Listed entries by the Triton kernels: on a GPU if there is one, else in Triton's interpreter under `triton_guard`."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from accuracy import make_labels
from sparse_cases import TAILS, TOKENS, VOCABULARY, Case, check_sparse, everything, make_case, results_of
from thinned import paired, some

from distill_kernels import divergences, plan, selected_logprobs, sparse_distillation_loss
from distill_kernels.backends import triton as backend

triton_guard = pytest.importorskip("triton_guard", reason="triton is not installed", exc_type=ImportError)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("guarded")
EACH = pytest.mark.parametrize("tail", TAILS)
PER_TOKEN = torch.randn(TOKENS, generator=torch.Generator().manual_seed(0))
SLACK_16 = 2  # gradients of logits are rounded to 16 bits before their products, which eager does not do


def check(case, **options):
    slack = options.pop("slack", 1) * (SLACK_16 if case.hidden.dtype.itemsize == 2 else 1)
    return check_sparse(case, backend="triton", device=DEVICE, slack=slack, **options)


@pytest.mark.parametrize("dtype, tail", paired([torch.float32, torch.bfloat16, torch.float16], TAILS))
def test_every_option_matches_reference(dtype, tail):
    case = make_case("realistic", bias=True, temperature=2.0, dtype=dtype)
    check(case, tail=tail, divergence=divergences.jensen_shannon(0.3), **everything(case))


@EACH
def test_per_token_loss_matches_reference(tail):
    check(make_case("moderate"), tail=tail, divergence="reverse_kl", reduction="none", upstream=PER_TOKEN)


@pytest.mark.parametrize("tail, family", paired(TAILS, ["peaked", "huge"]))
def test_input_family_matches_reference(family, tail):
    check(make_case(family), tail=tail, reduction="none", upstream=PER_TOKEN)


@pytest.mark.parametrize("tokens, vocabulary, dim, width", [(1, 1, 1, 1), (5, 97, 7, 97), (40, 700, 9, 150)])
def test_ragged_sizes_match_reference(tokens, vocabulary, dim, width):
    # Lists of several blocks, and of everything.
    case = make_case("grid", tokens, vocabulary, dim, width, bias=True, ragged=tokens > 5, temperature=2.0)
    check(case, tail="bucket", slack=4, **everything(case))


def test_several_chunks_match_reference():
    case = make_case("moderate", 80, 3000, 16, 9, bias=True)
    assert plan(80, 3000, 16, 0, listed=10, device=DEVICE, backend="triton", workspace_mib=1).chunks > 1
    check(case, tail="bucket", workspace_mib=1, **everything(case) | {"temperature": 1.0})


def test_negative_scale_and_a_softcap_do_not_find_what_was_listed():
    """A mark in the place of a listed logit that survived the head would be its largest."""
    check(make_case("moderate"), tail="bucket", student_logit_scale=-0.9)
    check(make_case("moderate"), tail="bucket", student_logit_scale=-0.9, student_softcap=4.0, reduction="none", upstream=PER_TOKEN)


def test_selected_logprobs_are_those_of_the_torch_backend():
    case = make_case("moderate", 19, 260, bias=True)
    results = []
    for name in ("triton", "torch"):
        hidden, weight, bias = (tensor.detach().clone().to(DEVICE).requires_grad_() for tensor in case[:3])
        logprobs, rest = selected_logprobs(hidden, weight, case.ids.to(DEVICE), bias=bias, temperature=1.5, softcap=9.0, backend=name)
        loss = (logprobs * torch.linspace(-1, 2, logprobs.numel(), device=DEVICE).view(logprobs.shape)).sum() + 0.7 * rest.sum()
        results.append([logprobs.detach(), rest.detach(), *torch.autograd.grad(loss, [hidden, weight, bias])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6 * float(want.abs().max()))


def test_masked_tokens_that_are_not_left_out_have_no_gradient(monkeypatch):
    """As where a CUDA graph is captured: they go through, with ids of nothing and hidden states that overflow."""
    case = make_case("moderate", ragged=False)
    labels = torch.arange(TOKENS)
    labels[5::4] = -100
    masked = labels < 0
    options = {"tail": "bucket", "labels": labels.to(DEVICE), "ce_weight": 0.3, "student_softcap": 20.0, "backend": "triton"}
    clean = results_of(sparse_distillation_loss, case.to(DEVICE), 1.7, **options)
    dirty = Case(
        case.hidden.masked_fill(masked[:, None], 1e30), case.weight, None, case.ids.masked_fill(masked[:, None], 10**6), case.logprobs
    )
    monkeypatch.setattr(backend.chunked, "compacts", lambda problem: False)
    got = results_of(sparse_distillation_loss, dirty.to(DEVICE), 1.7, **options)
    for name in clean:
        torch.testing.assert_close(got[name], clean[name], rtol=2e-5, atol=2e-6 * float(clean[name].abs().max()))
    assert not got["d_hidden"][masked.to(DEVICE)].any()


def test_nan_of_the_student_is_not_lost():
    case = make_case("moderate", ragged=False)
    case.weight[case.ids[3, 0], 0] = math.nan
    got = results_of(sparse_distillation_loss, case.to(DEVICE), 1.7, tail="ignore", reduction="none", backend="triton")
    assert got["loss"].isnan().all() and got["d_hidden"].isnan().any(-1).all()


KERNELS = Path(backend.__file__).with_name("listed_entries.py")
# (text, what takes its place): mistakes that the kernels could have.
MISTAKES = {
    "listed entries are not taken out": ("tl.store(logits + at, LOWEST, mask=there)", "tl.store(logits + at, product, mask=there)"),
    "bias is left out": ("product += tl.load(bias + entries, mask=there, other=0.0).to(tl.float32)", "product += 0.0"),
    "splits are not bounded": ("mask=there[:, None] & inside[None, :], other=LOWEST", "mask=there[:, None], other=LOWEST"),
    "running maximum is forgotten": ("tempered *= tl.exp((maximum - now) * inverse_temperature)", "tempered *= 1.0"),
    "untempered sum is tempered": ("tl.where(counted, tl.exp(below), 0.0)", "tl.where(counted, tl.exp(below * inverse_temperature), 0.0)"),
    "pull is forgotten": ("made += pull[:, None] * tl.exp(below - log_sum_bare[:, None])", "made += 0.0"),
    "slope of the softcap is forgotten": ("made *= 1.0 - ratio * ratio", "made *= 1.0"),
    "slope of the softcap is forgotten where listed": ("made * (1.0 - ratio * ratio))", "made)"),
    "listed gradients have no scale": ("made = given * scale", "made = given"),
    "others' gradients have no scale": ("factor = scale", "factor = 1.0"),
}


@pytest.mark.skipif(DEVICE.type != "cpu", reason="mistakes are made in the interpreter")
@pytest.mark.parametrize("old, new", some(MISTAKES, 3))
def test_mistake_is_found(old, new, tmp_path, monkeypatch):
    from distill_kernels.backends.triton import launch

    source = KERNELS.read_text()
    assert source.count(old) == 1
    (tmp_path / "mistaken_entries.py").write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("mistaken_entries", tmp_path / "mistaken_entries.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(launch, "listed_entries", module)
    # All tokens, so that there are so many that a split has several tiles.
    case = make_case("grid", bias=True, temperature=2.0)
    options = everything(case) | {"labels": make_labels(TOKENS, VOCABULARY, masked=0.0), "token_weight": None}
    with pytest.raises((AssertionError, triton_guard.GuardError)):
        check(case, tail="bucket", **options)
