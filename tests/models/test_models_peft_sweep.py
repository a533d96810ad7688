"""Adapters of peft, wherever they are: run_backbone's logits and gradients are the model's own to 1e-5, or it is refused and says why."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill_kernels import run_backbone

VOCABULARY = 211
BODY = {"target_modules": ["q_proj", "down_proj"]}
HEAD = {"target_modules": ["lm_head"]}
TOKENS = [1, 2, 5]


def lora(**options):
    return lambda: peft.LoraConfig(**options)


CONFIGURATIONS = {
    "LoRA": lora(**BODY),
    "rsLoRA": lora(use_rslora=True, **BODY),
    "DoRA": lora(use_dora=True, **BODY),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "parameters": lora(target_modules=[], target_parameters=["mlp.down_proj.weight"]),
    "LoRA on the head": lora(**HEAD),
    "rsLoRA on the head": lora(use_rslora=True, **HEAD),
    "LoRA with a bias on the head": lora(lora_bias=True, **HEAD),
    "LoRA on embeddings": lora(target_modules=["embed_tokens"]),
    "LoRA on embeddings, tied": lora(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "LoRA on embeddings and head": lora(target_modules=["embed_tokens", "lm_head"]),
    "tokens": lora(trainable_token_indices={"embed_tokens": TOKENS}, **BODY),
    "tokens of the head": lora(trainable_token_indices={"lm_head": TOKENS}, **BODY),
    "tokens of both": lora(trainable_token_indices={"embed_tokens": TOKENS, "lm_head": TOKENS}, **BODY),
    "tokens, tied": lora(trainable_token_indices=TOKENS, ensure_weight_tying=True, **BODY),
    "whole head": lora(modules_to_save=["lm_head"], **BODY),
    "whole embeddings and head": lora(modules_to_save=["embed_tokens", "lm_head"], **BODY),
    "whole embeddings and head, tied": lora(modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True, **BODY),
    "whole embeddings, tied": lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True, **BODY),
    "DoRA on the head": lora(use_dora=True, **HEAD),
    "IA3 on the head": lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    "parameters of the head": lora(target_modules=[], target_parameters=["lm_head.weight"]),
}
# While they are active and not merged: what they make of the head is no matrix of the size of its hidden states and a few more.
REFUSED = {
    "DoRA on the head": "variant of LoRA",
    "IA3 on the head": "the LM head of LlamaForCausalLM is Linear.*merge or remove",
    "parameters of the head": "the LM head of LlamaForCausalLM is ParamWrapper.*merge or remove",
}
STATES = ("active", "merged", "disabled", "stacked")


def adapted(name, tied, state):
    """A model with adapters that change something, or a skip where peft itself refuses them."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=tied, initializer_range=0.3,
        )
    )  # fmt: skip
    try:
        model = peft.get_peft_model(model, CONFIGURATIONS[name]())
        if state == "stacked":
            model.add_adapter("another", CONFIGURATIONS[name]())
            model.base_model.set_adapter(["default", "another"])
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(0.05 * torch.randn(parameter.shape))
        if state == "merged":
            model.merge_adapter()
        elif state == "disabled":
            model.base_model.disable_adapter_layers()
    except (ValueError, RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        pytest.skip(f"peft: {str(error)[:80]}")
    return model.eval(), [parameter for parameter in trained if parameter.requires_grad]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.covering(2)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_adapters_give_the_models_own_logits_and_gradients(name, tied, state):
    model, trained = adapted(name, tied, state)
    ids = torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(2, 7, VOCABULARY, generator=torch.Generator().manual_seed(2))
    wanted = model(input_ids=ids).logits
    if name in REFUSED and state in ("active", "stacked"):
        with pytest.raises(TypeError, match=REFUSED[name]):
            run_backbone(model, input_ids=ids)
        return
    output = run_backbone(model, input_ids=ids)
    got = output.hidden @ output.weight.T + (0 if output.bias is None else output.bias)
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    if not (trained and wanted.requires_grad):  # merged or disabled
        return
    gradients = [torch.autograd.grad((logits * upstream).sum(), trained, allow_unused=True) for logits in (got, wanted)]
    for parameter, left, right in zip(trained, *gradients, strict=True):
        assert (left is None) == (right is None)
        if right is not None:
            assert (left - right).abs().max() < 1e-5 * right.abs().max().clamp(min=parameter.abs().max())
