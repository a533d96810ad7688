"""run_backbone on models of peft: adapters in the body, LoRA on the LM head, heads that are trained beside an adapter."""

import pytest
import torch
from torch import nn

from distill_kernels.api.models.backbone import run_backbone, vocabulary_size

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

VOCAB, WIDTH = 99, 32
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def tiny_llama(dtype=torch.float32, tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=tied
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.to(dtype)


def adapted(model, target_modules, seed=2, **options):
    model = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=target_modules, task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # B starts as zeros, with which a forgotten adapter would not be seen
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model


def logits_of(output):
    return nn.functional.linear(output.hidden, output.weight, output.bias)


def gradients(model, logits):
    model.zero_grad()
    logits.float().square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:`lora_bias=True`")
@pytest.mark.parametrize(
    ("target_modules", "options", "tied", "width"),
    [
        (["q_proj", "down_proj"], {}, True, WIDTH),
        (["lm_head"], {}, False, WIDTH + 3),
        (["v_proj", "lm_head"], {"use_rslora": True}, True, WIDTH + 3),
        (["lm_head"], {"lora_bias": True}, False, WIDTH + 3),
        (["v_proj"], {"modules_to_save": ["lm_head"]}, False, WIDTH),
    ],
)
def test_run_backbone_takes_adapters_exactly(target_modules, options, tied, width):
    model = adapted(tiny_llama(tied=tied), target_modules, **options).train()
    if "modules_to_save" in options:
        with torch.no_grad():
            model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    expected = model(input_ids=IDS).logits
    output = run_backbone(model, input_ids=IDS)
    assert output.hidden.shape[-1] == output.weight.shape[1] == width
    assert vocabulary_size(model) == VOCAB
    torch.testing.assert_close(logits_of(output), expected, rtol=1e-5, atol=1e-5)

    got, wanted = gradients(model, logits_of(output)), gradients(model, expected)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_run_backbone_applies_the_dropout_of_a_head_s_adapter():
    model = adapted(tiny_llama(), ["lm_head"], lora_dropout=0.5).train()
    torch.manual_seed(7)
    expected = model(input_ids=IDS).logits
    torch.manual_seed(7)
    torch.testing.assert_close(logits_of(run_backbone(model, input_ids=IDS)), expected, rtol=1e-5, atol=1e-5)
    model.eval()
    assert not torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-2)
    torch.testing.assert_close(logits_of(run_backbone(model, input_ids=IDS)), model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


def test_run_backbone_keeps_small_updates_of_a_bfloat16_head():
    """An update of a thousandth of the weight vanishes when it is added to the weight in bfloat16."""
    model = adapted(tiny_llama(torch.bfloat16), ["lm_head"])
    layer = model.get_base_model().lm_head
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(1e-3)
        output = run_backbone(model, input_ids=IDS)
        update = layer.get_delta_weight("default").double()
        exact = output.hidden[..., :WIDTH].double() @ update.T
    wide = output.hidden.double()[..., WIDTH:] @ output.weight.double()[:, WIDTH:].T
    assert (wide - exact).norm() < 0.01 * exact.norm()
    merged = (layer.base_layer.weight + update.to(torch.bfloat16)).double() - layer.base_layer.weight.double()
    assert (output.hidden.double()[..., :WIDTH] @ merged.T - exact).norm() > 0.3 * exact.norm()


def test_run_backbone_follows_what_peft_does_with_adapters():
    model = adapted(tiny_llama(), ["q_proj", "lm_head"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        model.get_base_model().lm_head.lora_B["other"].weight.normal_(std=0.3)

        def check(width):
            output = run_backbone(model, input_ids=IDS)
            assert output.weight.shape[1] == width
            torch.testing.assert_close(logits_of(output), model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)

        check(WIDTH + 3)
        model.base_model.set_adapter(["default", "other"])
        check(WIDTH + 5)
        model.set_adapter("other")
        check(WIDTH + 2)
        with model.disable_adapter():
            check(WIDTH)
        model.merge_adapter()
        check(WIDTH)
        model.unmerge_adapter()
        check(WIDTH + 2)


def test_run_backbone_takes_adapters_without_a_peft_model():
    config = peft.LoraConfig(r=3, target_modules=["v_proj", "lm_head"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, tiny_llama())
    assert isinstance(model, transformers.LlamaForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(run_backbone(model, input_ids=IDS)), model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True, "target_modules": ["lm_head"]}, "variant of LoRA.*wanted plain LoRA on the LM head"),
        ({"alora_invocation_tokens": [5], "target_modules": ["q_proj"]}, "type LORA, which changes more than the model's layers"),
    ],
)
def test_run_backbone_refuses_lora_of_other_kinds(config, message):
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=3, task_type="CAUSAL_LM", **config))
    for call in (lambda: run_backbone(model, input_ids=IDS), lambda: vocabulary_size(model)):
        with pytest.raises(TypeError, match=message):
            call()


def test_run_backbone_refuses_adapters_it_cannot_take():
    prompted = peft.get_peft_model(tiny_llama(), peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match="PROMPT_TUNING, which changes more than the model's layers"):
        run_backbone(prompted, input_ids=IDS)
    vectors = peft.get_peft_model(tiny_llama(), peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match=r"wanted a plain torch\.nn\.Linear with a plain Parameter, or one with LoRA"):
        run_backbone(vectors, input_ids=IDS)
