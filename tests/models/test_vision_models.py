"""Models that read images and text: what they read is passed on, and their language model's head found."""

import pytest
import torch
from test_models import logits_of
from thinned import some

from benchmarks.models.tiny import VOCAB, there, tiny_model
from benchmarks.models.tiny_vision import ARCHITECTURES, IMAGE, tiny_vision_model, vision_batch
from distill_kernels import next_token_labels
from distill_kernels.api.models.backbone import run_backbone, vocabulary_size
from distill_kernels.api.models.labels import placeholder_ids


@pytest.mark.parametrize("model_type", there(ARCHITECTURES))
def test_images_are_passed_on(model_type):
    model, batch = tiny_vision_model(model_type), vision_batch(model_type)
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        torch.testing.assert_close(logits_of(run_backbone(model, **batch)), expected, rtol=1e-5, atol=1e-5)
        other = {**batch, "pixel_values": batch["pixel_values"] + 0.5}
        assert (logits_of(run_backbone(model, **other)) - expected).abs().max() > 0.1
    assert vocabulary_size(model) == VOCAB


def test_a_body_that_ignores_images_is_refused():
    model, batch = tiny_vision_model("smolvlm"), vision_batch("smolvlm")
    model.base_model_prefix = "text"  # a language model alone, which takes any keyword
    model.text = model.model.text_model
    with pytest.raises(NotImplementedError, match=r"does not read pixel_values as the model's own forward does: .* differ by [01]\.?\d*"):
        run_backbone(model, **batch)
    run_backbone(model, input_ids=batch["input_ids"][:, :4])  # text


@pytest.mark.parametrize("model_type", some(there(ARCHITECTURES), ["gemma3", "qwen2_5_vl"]))
def test_gradients_reach_the_images_tower(model_type):
    model, batch = tiny_vision_model(model_type), vision_batch(model_type)
    logits_of(run_backbone(model, **batch)).square().mean().backward()
    got = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    model(**batch, use_cache=False).logits.square().mean().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert got.keys() == wanted.keys()
    assert any("vis" in name for name in wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("model_type", there(ARCHITECTURES))
def test_nothing_is_learned_of_placeholders(model_type):
    model, batch = tiny_vision_model(model_type), vision_batch(model_type)
    placeholders = placeholder_ids(model)
    assert IMAGE in placeholders
    ids = batch["input_ids"]
    labels = next_token_labels(ids, placeholders=placeholders)
    for row in range(len(ids)):
        for place in range(ids.shape[1] - 1):
            following = int(ids[row, place + 1])
            assert labels[row, place] == (-100 if following in placeholders else following)
    assert placeholder_ids(tiny_model("llama")) == ()
