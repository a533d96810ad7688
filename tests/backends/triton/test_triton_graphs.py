"""Forward and backward of the Triton backend where a CUDA graph is captured: nothing waits for the device, replays give what calls do."""

import functools

import pytest
import torch
from accuracy import everything, make_inputs, make_labels, with_gradients
from thinned import paired
from torch.utils._python_dispatch import TorchDispatchMode

from distill_kernels import distillation_loss
from distill_kernels.backends import triton as backend
from distill_kernels.estimators import quantised, sampling
from distill_kernels.ops import whole_vocabulary
from distill_kernels.schedule import chunked

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("guarded")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
TOKENS, VOCABULARY = 21, 300
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_device(options):
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def test_graph_being_captured_gets_the_same_result_without_compaction(monkeypatch):
    # A capture cannot wait for the number of tokens that count: all go through, and what is masked gives zeros.
    inputs = make_inputs("moderate", bias=True).to(DEVICE)
    options = {**on_device(everything(TOKENS, VOCABULARY)), "num_items": None, "reduction": "sum", "backend": "triton"}
    compacted = with_gradients(distillation_loss, inputs, 1.7, **options)
    not_compacted(monkeypatch)
    for reduction, upstream in (("sum", 1.7), ("none", torch.full((TOKENS,), 1.7))):
        whole = with_gradients(distillation_loss, inputs, upstream, **options | {"reduction": reduction})
        for name in compacted:
            value = whole[name].sum() if name == "loss" else whole[name]
            torch.testing.assert_close(value, compacted[name], rtol=1e-5, atol=1e-6 * compacted[name].abs().max().item())


CAPTURED = {
    "everything": everything(TOKENS, VOCABULARY) | {"num_items": None},
    "sampled": {"column_fraction": 0.08, "seed": 3},
    "sampled, kept for backward": {"labels": make_labels(TOKENS, VOCABULARY), "column_fraction": 0.08, "seed": 3, "reduction": "none"},
    "masked and sampled": {"labels": make_labels(TOKENS, VOCABULARY), "ce_weight": 0.5, "column_fraction": 0.08, "seed": 3},
    # Without a tolerance: a replay cannot recompute what a call would.
    "swept": {"column_fraction": 0.08, "seed": 3, "sweep": "int8", "sweep_tolerance": None},
    "masked and swept": {
        "labels": make_labels(TOKENS, VOCABULARY), "ce_weight": 0.5, "column_fraction": 0.3, "seed": 3, "sweep": "int8",
        "sweep_tolerance": None,
    },
}  # fmt: skip
captured = pytest.mark.parametrize("options, dtype", paired(CAPTURED, DTYPES))


def not_compacted(monkeypatch):
    """As where a graph is captured."""
    for module in (chunked, whole_vocabulary):
        monkeypatch.setattr(module, "compacts", lambda problem: False)


class NothingIsRead(TorchDispatchMode):
    """Refuses what on a GPU waits for a result: a number of a tensor's, or how many of its elements are true."""

    WAITING = ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name == "index" and any(index is not None and index.dtype is torch.bool for index in args[1])
        assert name not in self.WAITING and not masks, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


class OnDevice(torch.Tensor):
    """Of a CPU tensor that says it is a GPU's."""

    is_cuda = property(lambda self: True)


@captured
def test_graph_being_captured_waits_for_nothing(options, dtype, sampling_pays, monkeypatch):
    ran, drawn, draw = [], [], sampling.draw

    def watched(function, *arguments):
        ran.append(function.__name__)
        with NothingIsRead():
            return function(*arguments)

    for name in ("run", "multiply_kept"):
        monkeypatch.setattr(backend, name, functools.partial(watched, getattr(backend, name)))
    monkeypatch.setattr(sampling, "draw", lambda scores, *rest: drawn.append(rest) or draw(scores.as_subclass(OnDevice), *rest))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    exceeds = quantised.Trust.exceeds
    monkeypatch.setattr(
        quantised.Trust,
        "exceeds",
        lambda self, chunk, *scales: exceeds(self, chunk._replace(errors=chunk.errors.as_subclass(OnDevice)), *scales),
    )
    not_compacted(monkeypatch)
    inputs = make_inputs("moderate", dtype=dtype).to(DEVICE)
    options = {name: value for name, value in options.items() if name != "sweep_tolerance"}  # nor for any tolerance
    with_gradients(distillation_loss, inputs, 1.7, backend="triton", **on_device(options))
    assert len(drawn) == ("column_fraction" in options)
    assert ran == ["run"] + ["multiply_kept"] * (options.get("reduction") == "none")


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs want a GPU")
@captured
def test_cuda_graph_replays_what_calls_give(options, dtype, sampling_pays, monkeypatch):
    inputs = make_inputs("moderate", dtype=dtype).to(DEVICE)
    leaves, teacher = [x.requires_grad_() for x in inputs[:2]], inputs[2:4]
    options = on_device(options)

    def step():
        loss = distillation_loss(*leaves, *teacher, backend="triton", **options)
        return loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, 1.7))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), monkeypatch.context() as patched:
        not_compacted(patched)
        step()  # compiles, which a capture may not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for seed in range(3):
        with torch.no_grad():
            for there, other in zip(inputs[:4], make_inputs("realistic", dtype=dtype, seed=seed)[:4], strict=True):
                there.copy_(other)
        if "labels" in options:  # other tokens are masked, in the end all of them
            options["labels"].copy_(make_labels(TOKENS, VOCABULARY, seed=seed))
            if seed == 2:
                options["labels"].fill_(-100)
        graph.replay()
        # With fewer tokens a product may be rounded otherwise, and near a column's edge that is enough to draw its neighbour.
        if "column_fraction" in options:
            not_compacted(monkeypatch)
        for got, called in zip(replayed, step(), strict=True):
            eps = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
            torch.testing.assert_close(got, called, rtol=eps, atol=eps * called.abs().max().item())


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs want a GPU")
def test_cuda_graph_draws_other_columns_at_every_replay(sampling_pays):
    inputs = make_inputs("moderate").to(DEVICE)
    leaves = [x.requires_grad_() for x in inputs[:2]]

    def step():
        return torch.autograd.grad(distillation_loss(*inputs[:4], backend="triton", column_fraction=0.08), leaves)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, d_weight = step()
    kept = []
    for _ in range(3):
        graph.replay()
        kept.append(tuple(d_weight.any(1).nonzero().flatten().tolist()))
    assert len(set(kept)) > 1 and {len(k) for k in kept} == {24}
