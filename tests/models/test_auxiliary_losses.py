"""What a model's own loss has beside cross entropy: read without its LM head, to the value and the gradients of its own forward."""

import warnings

import pytest
import torch
import transformers
from test_models import tokens
from thinned import some
from torch.nn.functional import cross_entropy

from benchmarks.models.tiny import there, tiny_model
from distill_kernels.api.models.backbone import auxiliary_names, check_model, run_backbone

# Experts counted by the model, by its configuration, and in a grid; a coefficient of another name, and one in a nested configuration.
MIXTURES = [
    "dbrx", "deepseek_v4", "doge", "ernie4_5_moe", "flex_olmo", "flint", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid",
    "granitemoeshared", "jamba", "jetmoe", "laguna", "lara_mini", "mellum", "minimax", "minimax_m2", "minimax_m3_vl_text", "mixtral",
    "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen4_exp_text",
]  # fmt: skip


def batch_of(padded):
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def beside_cross_entropy(model, **batch):
    """What a plain Trainer minimises, less the cross entropy of the model's own logits."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    output = model(**batch, labels=labels, use_cache=False)
    return output.loss - cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@pytest.mark.parametrize("model_type", some(there(MIXTURES), there(["dbrx", "doge", "jetmoe", "mixtral", "olmoe", "qwen3_moe"])))
@pytest.mark.parametrize("padded", [False, True])
def test_routers_losses_are_those_of_the_model_s_own_forward(model_type, padded):
    model = tiny_model(model_type, output_router_logits=True)
    batch = batch_of(padded)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        output = run_backbone(model, **batch)
    value, coefficient = output.auxiliary["router_aux_loss"]
    assert auxiliary_names(model) == ("router_aux_loss",)
    assert value.shape == ()
    assert coefficient > 0
    with torch.no_grad():
        wanted = beside_cross_entropy(model, **batch)
        assert wanted > 1e-3
        torch.testing.assert_close(output.auxiliary_loss, wanted, rtol=1e-3, atol=1e-6)  # wanted is a small difference of large ones
        own = model(**batch, use_cache=False).aux_loss
    torch.testing.assert_close(value, own, rtol=1e-5, atol=0)


def test_gradients_of_routers_losses_are_the_model_s_own():
    model = tiny_model("qwen3_moe", output_router_logits=True)
    batch = batch_of(padded=True)
    run_backbone(model, **batch).auxiliary_loss.backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    (model.router_aux_loss_coef * model(**batch, use_cache=False).aux_loss).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert got.keys() == wanted.keys()
    assert any("gate" in name for name in wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_routers_losses_are_computed_where_they_are_asked_for():
    model = tiny_model("mixtral")
    batch = batch_of(padded=False)
    assert run_backbone(model, **batch).auxiliary == {}
    assert run_backbone(model, **batch).auxiliary_loss == 0.0
    assert auxiliary_names(model) == ()
    assert run_backbone(model, **batch, output_router_logits=True).auxiliary_loss > 0  # in the batch
    model.config.output_router_logits = True
    assert run_backbone(model, **batch, output_router_logits=False).auxiliary == {}
    assert "auxiliary" not in " ".join((*run_backbone(model, **batch).as_student(), *run_backbone(model, **batch).as_teacher()))
    # Balanced by biases of their routers: their own losses have nothing beside cross entropy, whatever their configuration says.
    for model_type in ("deepseek_v3", "glm4_moe"):
        assert run_backbone(tiny_model(model_type, output_router_logits=True), **batch).auxiliary == {}


def test_compiled_routers_losses_are_the_same():
    model = tiny_model("mixtral", output_router_logits=True)
    batch = batch_of(padded=False)
    wanted = run_backbone(model, **batch).auxiliary_loss
    torch.compiler.reset()
    compiled = torch.compile(lambda **batch: run_backbone(model, **batch).auxiliary_loss, backend="eager")
    torch.testing.assert_close(compiled(**batch), wanted)


def test_losses_that_cannot_be_read_are_named():
    """A prediction of the token after the next, say, whose head run_backbone knows nothing of."""

    class Further(transformers.LlamaForCausalLM):
        def forward(self, *args, labels=None, **kwargs):
            output = super().forward(*args, labels=labels, **kwargs)
            if labels is not None:
                output.loss = output.loss + 0.3 * output.logits[:, :-2].logsumexp(-1).mean()
            return output

    plain = tiny_model("llama")
    model = Further(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    with pytest.warns(UserWarning, match=r"the loss of Further has [1-9]\S* beside the cross entropy of its logits.*leaves it out"):
        check_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check_model(plain)


def test_a_loss_that_only_run_backbone_has_is_named():
    class Forgetful(transformers.MixtralForCausalLM):
        def forward(self, *args, labels=None, output_router_logits=None, **kwargs):
            return super().forward(*args, labels=labels, output_router_logits=False, **kwargs)

    model = Forgetful(tiny_model("mixtral", output_router_logits=True).config).eval()
    with pytest.warns(UserWarning, match=r"Forgetful leaves out of its own loss .*; set it to False"):
        check_model(model)
    model.config.output_router_logits = False
    assert run_backbone(model, input_ids=tokens(1, 4)).auxiliary == {}


def test_a_z_loss_of_the_model_s_own_is_named_with_the_option_that_has_it():
    with pytest.warns(UserWarning, match="pass z_loss_weight=0.01 to have it"):
        check_model(tiny_model("bamba", z_loss_coefficient=0.01))
