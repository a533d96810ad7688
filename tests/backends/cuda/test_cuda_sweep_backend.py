"""The tile-fused schedule of the cuda backend: on a GPU if there is one and the extension was built, else its kernels in emulation."""

from types import SimpleNamespace

import pytest
import torch
from accuracy import assert_as_good_as_eager, eager_loss, eager_with_gradients, everything, make_inputs, make_token_weight, moved
from cuda_emulated import DEVICE, ON_GPU

from distill_kernels import distillation_loss, divergences, plan, reference, token_logprobs
from distill_kernels.backends.cuda import launch, sweep
from distill_kernels.backends.cuda.launch import Limits

pytestmark = pytest.mark.usefixtures("kernels")
TOKENS, VOCABULARY = 140, 300
H100 = Limits(90, 132, 227 * 1024, 8, 512)
A100 = Limits(80, 108, 163 * 1024, 1, 512)


def of_capability(capability, monkeypatch):
    limits = launch.limits(0)._replace(capability=capability)
    monkeypatch.setattr(launch, "limits", lambda index: limits)


def inputs_of_16_bits(**changes):
    chosen = {"tokens": TOKENS, "vocabulary": VOCABULARY, "dtype": torch.bfloat16, "bias": True}
    return make_inputs("realistic", **chosen | changes)


def check_value(inputs, **options):
    """Of a loss without gradients. `moved` to the GPU, if that is where it runs."""
    here = inputs.to(DEVICE)
    biases = {"student_bias": here.student_bias, "teacher_bias": here.teacher_bias}
    got = distillation_loss(*here[:4], **biases, backend="cuda", **moved(options, DEVICE))
    wide = inputs.to(torch.float64)
    truth = reference.distillation_loss(*wide[:4], student_bias=wide.student_bias, teacher_bias=wide.teacher_bias, **options)
    eager = eager_with_gradients(eager_loss, inputs, torch.ones(()), **options)["loss"]
    assert_as_good_as_eager("loss", got.cpu(), eager, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("capability", [90, 80], ids=["wgmma", "mma.sync"])
def test_loss_without_gradients_matches_reference(capability, dtype, monkeypatch):
    if capability == sweep.WGMMA_CAPABILITY and ON_GPU and launch.limits(DEVICE.index or 0).capability != capability:
        pytest.skip("this GPU has no wgmma")
    of_capability(capability, monkeypatch)
    check_value(inputs_of_16_bits(dtype=dtype), **everything(TOKENS, VOCABULARY))


def test_tokens_of_each_loss():
    changes = {"reduction": "none", "num_items": None, "token_weight": make_token_weight(TOKENS), "divergence": "reverse_kl"}
    check_value(inputs_of_16_bits(), **everything(TOKENS, VOCABULARY) | changes)


def test_matrices_that_copies_of_16_bytes_cannot_read():
    inputs = inputs_of_16_bits(tokens=9, student_dim=24)

    def shifted(matrix):
        """The same matrix, each row an element off a multiple of 16 bytes."""
        wide = matrix.new_full((matrix.shape[0], matrix.shape[1] + 3), torch.nan)
        wide[:, 1:-2] = matrix
        return wide[:, 1:-2]

    student = {name: shifted(getattr(inputs, name)) for name in ("student_hidden", "student_weight")}
    check_value(inputs._replace(**student, teacher_weight=inputs.teacher_weight.T.contiguous().T))


def test_log_probabilities_without_a_teacher():
    inputs = inputs_of_16_bits(bias=False)
    ids = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))
    hidden, weight, here = inputs.student_hidden.to(DEVICE), inputs.student_weight.to(DEVICE), ids.to(DEVICE)
    got = token_logprobs(hidden, weight, here, backend="cuda")
    truth = reference.token_logprobs(inputs.student_hidden, inputs.student_weight, ids)
    for name, one, other in zip(("log probability", "entropy"), got, truth, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=2e-5, atol=2e-5, msg=name)


def planned(student_dim=64, teacher_dim=128, dtype=torch.bfloat16, **options):
    gradients = {"hidden_gradient": False, "weight_gradient": False}
    return plan(8192, 32000, student_dim, teacher_dim, dtype=dtype, device=DEVICE, backend="cuda", **gradients, **options)


def test_schedule_is_tile_fused_where_nothing_needs_the_logits():
    assert planned().schedule == planned(dtype=torch.float16).schedule == "tile-fused"
    assert planned(divergence=divergences.jensen_shannon(0.5)).schedule == "chunked"
    for made, words in (
        (planned(dtype=torch.float32), "the student's are float32"),
        (planned(student_dim=20), "the student's hidden size 20"),
        (planned(teacher_dim=12), "the teacher's hidden size 12"),
    ):
        assert made.schedule == "chunked" and words in made.reason


def test_memory_is_no_more_than_planned(kernels):
    of_token, beside = kernels.sweep_token_bytes(1), kernels.sweep_token_bytes(2) - kernels.sweep_token_bytes(1)
    for limits in (H100, A100, H100._replace(multiprocessors=7)):
        for tokens in (1, 127, 128, 129, 1000, 9000, 50000):
            for vocabulary in (1, 300, 32000, 262144):
                splits = sweep.sweep_shape(tokens, vocabulary, limits).splits
                most = tokens * of_token + beside * 128 * sweep.MOST_WAVES * limits.multiprocessors
                assert tokens * kernels.sweep_token_bytes(splits) <= most, (limits, tokens, vocabulary)


def test_memory_is_planned_for_the_current_device_if_none_is_named(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: pytest.fail("nothing is launched"))
    monkeypatch.setattr(launch, "limits", lambda index: asked.append(index) or H100)
    for device in ("cuda", "cuda:1"):
        sweep.workspace_bytes(SimpleNamespace(device=torch.device(device)))
    assert asked == [3, 1]


@pytest.mark.parametrize("limits", [H100, A100], ids=["sm_90", "sm_80"])
def test_splits_cover_the_vocabulary_and_fill_the_chip(limits):
    for tokens in (1, 64, 129, 2048, 8192, 20000):
        for vocabulary in (1, 1000, 49152, 128256, 262144):
            shape = sweep.sweep_shape(tokens, vocabulary, limits)
            assert shape.split_entries % 128 == 0 and shape.blocks % shape.cluster == 0
            assert shape.splits * shape.split_entries >= vocabulary and shape.blocks * 128 >= tokens
            assert (shape.instructions, shape.cluster > 1) == ((sweep.WGMMA, tokens > 128) if limits is H100 else (sweep.MMA, False))
    for tokens in (64, 2048, 8192, 20000):  # tiles' time of all multiprocessors, of which at most an eighth is waited for
        shape = sweep.sweep_shape(tokens, 128256, limits)
        waves = -(-shape.blocks * shape.splits // limits.multiprocessors) * (shape.split_entries // 128)
        assert shape.blocks * 1002 / limits.multiprocessors >= 0.875 * waves, tokens
