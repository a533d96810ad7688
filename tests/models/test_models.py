import pytest
import torch
import transformers
from thinned import some
from torch import nn

from benchmarks.models.tiny import VOCAB, WIDTH, there, tiny_config, tiny_model
from distill_kernels.api.models import architectures
from distill_kernels.api.models.backbone import BackboneOutput, run_backbone
from distill_kernels.api.models.hidden_states import head_input

BATCH, LENGTH = 2, 9
HEAD_BIAS = {"bert", "codegen", "ernie4_5_moe", "gptj", "modernbert-decoder", "phi", "phimoe"}


def tokens(*shape):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def logits_of(output):
    logits = output.logit_scale * nn.functional.linear(output.hidden, output.weight, output.bias)
    return logits if output.softcap is None else output.softcap * torch.tanh(logits / output.softcap)


# Scales, caps, biases, projections and states changed behind the body, each once, most of them of types that are listed nowhere.
THIN = [
    "apertus", "bamba", "bert", "bloom", "cohere", "cohere2_moe", "deepseek_v32", "ernie4_5_moe", "falcon_h1", "falcon_mamba", "gemma2",
    "gemma3n_text", "gemma4_text", "gpt2", "gptj", "granite", "granite_swa", "hyperclovax", "inkling_text", "jetmoe", "llama",
    "llama4_text", "mamba", "minicpm3", "ministral3", "modernbert-decoder", "nanochat", "olmoe", "opt", "persimmon", "phimoe",
    "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba",
]  # fmt: skip
# What is behind their bodies is run, too, up to the head.
BEHIND_THE_BODY = {"bert", "modernbert-decoder"}


@pytest.mark.parametrize("model_type", some(there(sorted({*THIN, *architectures._KNOWN})), there(THIN)))
def test_run_backbone_matches_logits(model_type):
    model = tiny_model(model_type)
    assert model.config.model_type == model_type
    batch = {"input_ids": tokens(BATCH, LENGTH), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.int64)}
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits  # for some cannot make the cache that they would keep
        output = run_backbone(model, **batch)
    head = model.get_output_embeddings()
    assert output.hidden.shape == (BATCH, LENGTH, head.in_features)
    assert output.weight is head.weight
    assert (output.bias is not None) == (model_type in HEAD_BIAS)
    torch.testing.assert_close(logits_of(output), expected, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 0.5
    assert (architectures._measured[model].hidden is head_input) == (model_type in BEHIND_THE_BODY)
    known = architectures._KNOWN.get(model_type)
    assert known is None or known.recipe == architectures._measured[model].recipe


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_run_backbone_softcap_absent_is_none(model_type):
    model = tiny_model(model_type, final_logit_softcapping=None)
    ids = tokens(BATCH, LENGTH)
    with torch.no_grad():
        output = run_backbone(model, input_ids=ids)
        assert output.softcap is None
        torch.testing.assert_close(logits_of(output), model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_run_backbone_gradients_match_model(tied):
    model = tiny_model("llama", tie_word_embeddings=tied)
    ids = tokens(BATCH, LENGTH)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    logits_of(run_backbone(model, input_ids=ids)).square().mean().backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(input_ids=ids).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe", "opt"])
def test_run_backbone_never_computes_logits_or_loss(model_type, monkeypatch):
    model = tiny_model(model_type)
    ids = tokens(BATCH, LENGTH)
    plain = run_backbone(model, input_ids=ids)

    def refuse(*args, **kwargs):
        raise AssertionError("the LM head or the model's own forward was run")

    received = []
    backbone_forward = model.base_model.forward

    def record(*args, **kwargs):
        received.append(kwargs)
        return backbone_forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", refuse)
    monkeypatch.setattr(model.get_output_embeddings(), "forward", refuse)
    monkeypatch.setattr(model.base_model, "forward", record)
    for loss_arguments in ({"labels": ids}, {"labels": None}, {"labels": ids, "num_items_in_batch": 3, "use_cache": True}):
        torch.testing.assert_close(run_backbone(model, input_ids=ids, **loss_arguments).hidden, plain.hidden)
    assert len(received) == 3
    assert all(kwargs.keys() == {"input_ids", "use_cache", "return_dict"} and kwargs["use_cache"] is False for kwargs in received)


def test_run_backbone_works_without_dict_outputs():
    model = tiny_model("gpt2", return_dict=False)
    assert run_backbone(model, input_ids=tokens(1, 4)).hidden.shape == (1, 4, WIDTH)


def test_run_backbone_follows_resized_vocabulary():
    model = tiny_model("llama", tie_word_embeddings=True)
    model.resize_token_embeddings(VOCAB + 5)
    ids = tokens(1, 4)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(run_backbone(model, input_ids=ids)), model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_run_backbone_refuses_models_without_head():
    ids = tokens(1, 4)
    with pytest.raises(TypeError, match="LlamaModel, which has no LM head"):
        run_backbone(tiny_model("llama").model, input_ids=ids)
    with pytest.raises(TypeError, match="LlamaForSequenceClassification, which has no LM head"):
        run_backbone(transformers.LlamaForSequenceClassification(tiny_config("llama")), input_ids=ids)
    with pytest.raises(TypeError, match="got Linear, wanted a causal language model"):
        run_backbone(nn.Linear(2, 2), input_ids=ids)


def named_wrapper(name):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def __getattr__(self, attribute):
            try:
                return super().__getattr__(attribute)
            except AttributeError:
                return getattr(self.module, attribute)

    return type("Outer", (type(name, (Wrapper,), {}),), {})


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("DistributedDataParallel", "gradient hooks"),
        ("FullyShardedDataParallel", "fully_shard"),
    ],
)
def test_run_backbone_refuses_wrappers(name, advice):
    with pytest.raises(TypeError, match=f"wrapped in {name}.*{advice}"):
        run_backbone(named_wrapper(name)(tiny_model("llama")), input_ids=tokens(1, 4))


def test_run_backbone_refuses_torch_wrappers():
    model = tiny_model("llama")
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        with pytest.raises(TypeError, match="wrapped in"):
            run_backbone(wrapped, input_ids=tokens(1, 4))


class AdaptedLinear(nn.Module):
    """Shows its base layer's weight as its own, as adapters do, although its forward adds to it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(torch.ones_like(base.weight))

    @property
    def weight(self):
        return self.base.weight

    def forward(self, hidden):
        return self.base(hidden) + hidden @ self.delta.T


def test_run_backbone_refuses_heads_that_are_not_plain():
    model = tiny_model("llama")
    head = model.lm_head
    ids = tokens(1, 4)
    model.lm_head = AdaptedLinear(head)
    with pytest.raises(TypeError, match=r"AdaptedLinear.*wanted a plain torch\.nn\.Linear"):
        run_backbone(model, input_ids=ids)
    model.lm_head = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, VOCAB, bias=False))
    with pytest.raises(TypeError, match="ParametrizedLinear"):
        run_backbone(model, input_ids=ids)
    model.lm_head = head
    head.weight = nn.Parameter(head.weight[: VOCAB // 3].detach().clone())
    with pytest.raises(TypeError, match=r"\(70, 32\), wanted the whole \(211, 32\)"):
        run_backbone(model, input_ids=ids)


def test_run_backbone_refuses_logits_to_keep():
    with pytest.raises(ValueError, match="logits_to_keep"):
        run_backbone(tiny_model("llama"), input_ids=tokens(1, 4), logits_to_keep=1)


@pytest.mark.parametrize("with_bias", [False, True])
def test_backbone_output_arguments_cover_each_side(with_bias):
    bias = torch.ones(3, requires_grad=True) if with_bias else None
    output = BackboneOutput(torch.ones(1, 2, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True), bias, 0.5, 30.0)
    names = ["hidden", "weight", "bias", "logit_scale", "softcap"]
    student, teacher = output.as_student(), output.as_teacher()
    assert list(student) == [f"student_{name}" for name in names]
    assert list(teacher) == [f"teacher_{name}" for name in names]
    assert all(student[f"student_{name}"] is getattr(output, name) for name in names)
    for name in names[: 3 if with_bias else 2]:
        assert not teacher[f"teacher_{name}"].requires_grad
        assert teacher[f"teacher_{name}"].data_ptr() == getattr(output, name).data_ptr()
    assert (teacher["teacher_bias"] is None) == (not with_bias)
    assert (teacher["teacher_logit_scale"], teacher["teacher_softcap"]) == (0.5, 30.0)
