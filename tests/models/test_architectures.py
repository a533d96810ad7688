"""How a model makes logits, measured: recipes found, stale ones refused, what a user says, and that measuring leaves no trace."""

import copy
import logging

import pytest
import torch
import transformers
from test_models import logits_of, tokens
from torch import nn

from benchmarks.models.tiny import VOCAB, WIDTH, there, tiny_config, tiny_model
from distill_kernels import register_architecture
from distill_kernels.api.models import architectures
from distill_kernels.api.models.architectures import Architecture
from distill_kernels.api.models.backbone import check_model, run_backbone, vocabulary_size
from distill_kernels.api.models.measured_logits import LogitRecipe


@pytest.fixture
def knowledge(monkeypatch):
    """What is known of architectures, a copy for a test to change."""
    monkeypatch.setattr(architectures, "_KNOWN", dict(architectures._KNOWN))
    monkeypatch.setattr(architectures, "_measured_types", dict(architectures._measured_types))
    return architectures._KNOWN


def assert_exact(model, ids=None, rtol=1e-5):
    ids = tokens(2, 9) if ids is None else ids
    with torch.no_grad():
        torch.testing.assert_close(
            logits_of(run_backbone(model, input_ids=ids)), model(input_ids=ids, use_cache=False).logits, rtol=rtol, atol=1e-5
        )


class Rescaled(transformers.LlamaForCausalLM):
    """Of a type that nobody has heard of. Its forward is Llama's, and then what a configuration says under names of its own."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.config.output_multiplier / self.config.logits_divisor
        output.logits = self.config.logit_soft_cap * torch.tanh(output.logits / self.config.logit_soft_cap)
        return output


def rescaled(**changes):
    config = copy.deepcopy(tiny_model("llama").config)
    config.model_type = "unheard_of"
    config.output_multiplier, config.logits_divisor, config.logit_soft_cap = 0.7, 1.0, 2.5
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = Rescaled(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(15)
    return model


@pytest.mark.parametrize("changes", [{}, {"output_multiplier": 1.0, "logits_divisor": 3.0}, {"logit_soft_cap": 1e9}])
def test_products_of_a_scale_and_a_cap_are_found(knowledge, caplog, changes):
    model = rescaled(**changes)
    with caplog.at_level(logging.INFO, logger="distill_kernels"):
        assert_exact(model)
    (record,) = caplog.records
    assert "'unheard_of' makes logits as" in record.getMessage()
    assert "measured, to" in record.getMessage()


def test_a_cap_far_above_the_logits_is_found(knowledge):
    """Freshly initialised, the logits are 0.02, which a cap of 30 changes by less than rounding; trained, they are not."""
    model = transformers.Gemma2ForCausalLM(copy.deepcopy(tiny_model("gemma2", final_logit_softcapping=30.0).config)).eval()
    knowledge.pop("gemma2")
    with torch.no_grad():
        assert model(input_ids=tokens(1, 4)).logits.abs().max() < 1
        assert run_backbone(model, input_ids=tokens(1, 4)).softcap == 30.0


def test_what_no_recipe_gives_is_refused_with_the_figure(knowledge):
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 0.01 * output.logits.square()
            return output

    model = tiny_model("llama")
    shifted = Shifted(model.config).eval()
    shifted.load_state_dict(model.state_dict())
    for model_type in ("llama", "of_nobody"):
        shifted.config.model_type = model_type
        with pytest.raises(NotImplementedError, match=rf"'{model_type}'.*nearest of \d ways, .* is off by \d\.\de-\d\d") as caught:
            run_backbone(shifted, input_ids=tokens(1, 4))
        for argument in ("register_architecture", "_hidden", "_weight", "_bias", "_logit_scale", "_softcap"):
            assert argument in str(caught.value)


def test_a_listed_recipe_that_is_wrong_is_not_believed(knowledge, caplog):
    knowledge["granite"] = Architecture()
    model = tiny_model("granite")
    with caplog.at_level(logging.WARNING, logger="distill_kernels"):
        assert_exact(model)
    assert "logits_scaling, and not as hidden @ weight.T + bias" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", there(["granite", "minicpm3", "recurrent_gemma", "persimmon", "modernbert-decoder"]))
def test_sixteen_bits_are_measured_alike(knowledge, model_type, dtype):
    wide = tiny_model(model_type)
    narrow = copy.deepcopy(wide).to(dtype)
    check_model(wide)
    check_model(narrow)
    assert architectures._measured[narrow] == architectures._measured[wide]


def test_measuring_is_done_once_and_leaves_no_trace(knowledge, monkeypatch):
    model = tiny_model("qwen3_moe", attention_dropout=0.5).train()
    model.model.layers[1].eval()
    runs = []
    model.model.embed_tokens.register_forward_hook(lambda *_: runs.append(model.training))
    modes = [module.training for module in model.modules()]
    hooks = len(model.lm_head._forward_pre_hooks)
    state = torch.get_rng_state()
    check_model(model)
    assert runs == [False, False]
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert len(model.lm_head._forward_pre_hooks) == hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    check_model(model)
    run_backbone(model, input_ids=tokens(1, 4))
    assert runs == [False, False, True]
    assert vocabulary_size(tiny_model("prophetnet")) == VOCAB  # runs nothing


def test_compiled_functions_take_what_was_measured_before(knowledge):
    model = tiny_model("persimmon")
    knowledge.pop("persimmon", None)
    architectures._measured_types.pop("persimmon", None)
    compiled = torch.compile(lambda ids: run_backbone(model, input_ids=ids).hidden, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="call run_backbone once before"):
        compiled(tokens(1, 4))
    torch.compiler.reset()
    check_model(model)
    torch.testing.assert_close(compiled(tokens(1, 4)), run_backbone(model, input_ids=tokens(1, 4)).hidden)


def test_models_without_weights_are_taken_by_the_list(knowledge):
    with torch.device("meta"):
        listed, unlisted = (transformers.AutoModelForCausalLM.from_config(tiny_config(name)) for name in ("granite", "minimax"))
    check_model(listed)
    assert listed not in architectures._measured
    with pytest.raises(NotImplementedError, match=r"'minimax'.*its weights are on meta"):
        check_model(unlisted)


def transformed(model, **inputs):
    return model.cls.predictions.transform(model.bert(**inputs).last_hidden_state)


def test_registered_hidden_states_are_taken(knowledge):
    register_architecture("bert", hidden=transformed)
    model = tiny_model("bert")
    assert_exact(model)
    run_backbone(model, input_ids=tokens(1, 4)).hidden.sum().backward()
    assert model.bert.embeddings.word_embeddings.weight.grad.abs().max() > 0
    assert architectures._measured[model].hidden is transformed


@pytest.mark.skipif(not there(["dory"]), reason="this transformers does not have it")
def test_registered_heads_are_taken(knowledge):
    """dory multiplies each token's logit by a number that is learned."""
    model = tiny_model("dory")
    with torch.no_grad():
        model.lm_head.logit_scale.mul_(torch.linspace(0.5, 2.0, VOCAB))
    with pytest.raises(TypeError, match="DoryLMHead"):
        run_backbone(model, input_ids=tokens(1, 4))

    def head(model):
        scale = model.lm_head.logit_scale * model.lm_head.logit_scale_factor
        return model.lm_head.weight * scale[:, None], None

    register_architecture("dory", head=head)
    assert_exact(model)
    logits_of(run_backbone(model, input_ids=tokens(1, 4))).square().sum().backward()
    got = model.lm_head.logit_scale.grad.clone()
    model.zero_grad()
    model(input_ids=tokens(1, 4), use_cache=False).logits.square().sum().backward()
    torch.testing.assert_close(got, model.lm_head.logit_scale.grad, rtol=1e-4, atol=1e-5)


def test_registered_recipes_are_verified(knowledge):
    model = tiny_model("granite")
    register_architecture("granite", divide_by="logits_scaling")
    assert_exact(model)
    register_architecture("granite", divide_by=3.1)  # the number itself
    assert_exact(model)
    assert architectures._measured[model].recipe == LogitRecipe(divide_by=3.1)
    register_architecture("granite", hidden=lambda model, **inputs: 2 * model.model(**inputs).last_hidden_state)
    with pytest.raises(NotImplementedError, match=r"<lambda> the nearest of .* is off by 1.0e"):
        run_backbone(model, input_ids=tokens(1, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_type": transformers.LlamaConfig}, "model_type is type, wanted the name"),
        ({"model_type": "a", "softcap": True}, "softcap is bool, wanted a number"),
        ({"model_type": "a", "multiply_by": [1]}, "multiply_by is list, wanted a number, the name of a field"),
        ({"model_type": "a", "hidden": "model.norm"}, "hidden is str, wanted a function"),
        ({"model_type": "a", "head": nn.Linear(WIDTH, 2).weight}, "head is Parameter, wanted a function"),
    ],
)
def test_registrations_that_make_no_sense_are_refused(knowledge, arguments, message):
    with pytest.raises(TypeError, match=message):
        register_architecture(**arguments)
