import json
import math
import pickle
import shutil
import socket
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distill_kernels.api.models import backbone
from distill_kernels.api.models.backbone import BackboneOutput, load_causal_lm, next_token_labels, run_backbone

transformers = pytest.importorskip("transformers")

VOCAB = 99
WIDTH = 32
BATCH, LENGTH = 2, 9

# Sizes which every configuration understands, directly or through transformers' aliases (n_embd and the like).
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
DENSE = {"intermediate_size": 48}
EXPERTS = {**GATED, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
DEEPSEEK = {
    **DENSE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
MAMBA = {**DENSE, "num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
GATED_DELTA = {
    **EXPERTS,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
CAP = {"final_logit_softcapping": 1.7}
SCALING = {"logits_scaling": 3.1}
SLIDING_THEN_FULL = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
PER_LAYER = {
    **GATED,
    **CAP,
    **SLIDING_THEN_FULL,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}


def each(model_types, *parts):
    return {model_type: {name: value for part in parts for name, value in part.items()} for model_type in model_types.split()}


# model_type -> what its tiny configuration needs besides COMMON; scales, caps and biases are given values which change the logits.
ARCHITECTURES = {
    **each("apertus arcee ernie4_5 exaone4 gemma glm glm4 helium hunyuan_v1_dense lfm2 llama ministral mistral nemotron", GATED),
    **each("olmo olmo2 olmo3 phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm starcoder2", GATED),
    **each("dots1 glm4_moe gpt_oss mixtral olmoe qwen2_moe qwen3_moe", EXPERTS),
    **each("deepseek_v2 deepseek_v3", DEEPSEEK),
    **each("gemma2 gemma3_text nanochat vaultgemma", GATED, CAP),
    **each("granite hyperclovax", GATED, SCALING),
    **each("granitemoe granitemoeshared", EXPERTS, SCALING),
    **each("cohere cohere2", GATED, {"logit_scale": 0.37}),
    **each("qwen3_next qwen3_5_text", GATED_DELTA),
    **each("bloom falcon gpt2 gpt_bigcode mpt"),
    **each("codegen gptj", {"rotary_dim": 4}),
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "ernie4_5_moe": {**EXPERTS, "moe_num_experts": 4, "use_bias": True},
    "falcon_h1": {**MAMBA, "head_dim": 8, "mamba_d_ssm": 64, "lm_head_multiplier": 0.4},
    "gemma3n_text": {**PER_LAYER, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": {**PER_LAYER, "global_head_dim": 8},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": DENSE,
    "granitemoehybrid": {**EXPERTS, **MAMBA, **SCALING, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "jamba": {**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "phimoe": {**EXPERTS, "lm_head_bias": True},
}
HEAD_BIAS = {"codegen", "ernie4_5_moe", "gptj", "phi", "phimoe"}


def tiny_config(model_type, **changes):
    return transformers.CONFIG_MAPPING[model_type](**{**COMMON, **ARCHITECTURES[model_type], **changes})


def tiny_model(model_type, **changes):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).eval()
    # The usual initialisation keeps logits so small that a forgotten softcap or bias would hide in rounding.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
        bias = model.get_output_embeddings().bias
        if bias is not None:
            bias.normal_()
    return model


def tokens(*shape):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def logits_of(output):
    logits = output.logit_scale * nn.functional.linear(output.hidden, output.weight, output.bias)
    return logits if output.softcap is None else output.softcap * torch.tanh(logits / output.softcap)


def test_recipes_are_all_verified():
    assert set(ARCHITECTURES) == set(backbone._RECIPES)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_run_backbone_matches_logits(model_type):
    model = tiny_model(model_type)
    assert model.config.model_type == model_type
    batch = {"input_ids": tokens(BATCH, LENGTH), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.int64)}
    with torch.no_grad():
        expected = model(**batch).logits
        output = run_backbone(model, **batch)
    head = model.get_output_embeddings()
    assert output.hidden.shape == (BATCH, LENGTH, head.in_features)
    assert output.weight is head.weight
    assert (output.bias is not None) == (model_type in HEAD_BIAS)
    torch.testing.assert_close(logits_of(output), expected, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 0.5


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


def test_run_backbone_refuses_unknown_architecture():
    config = transformers.CONFIG_MAPPING["bert"](**COMMON, intermediate_size=48, is_decoder=True)
    model = transformers.BertLMHeadModel(config)
    with pytest.raises(NotImplementedError, match="'bert'") as caught:
        run_backbone(model, input_ids=tokens(1, 4))
    for argument in ("_hidden", "_weight", "_bias", "_logit_scale", "_softcap"):
        assert argument in str(caught.value)


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
    with pytest.raises(TypeError, match=r"\(33, 32\), wanted the whole \(99, 32\)"):
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


# Rows are documents (lists of tokens) with padding of a given length between, before and after them.
row_plans = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=4)


def lay_out(plans, restart_in_padding):
    """Rows of (padding, document length) pairs as tensors, with the labels that a loop over the documents gives."""
    rows = []
    for row, plan in enumerate(plans):
        ids, mask, positions, expected = [], [], [], []
        for padding, length in plan:
            ids += [0] * padding
            mask += [0] * padding
            positions += [0] * padding if restart_in_padding else [(positions or [-1])[-1] + 1 + i for i in range(padding)]
            expected += [-100] * padding
            document = [10 * row + 3 + len(ids) + i for i in range(length)]
            ids += document
            mask += [1] * length
            positions += list(range(length))
            expected += [*document[1:], -100]
        rows.append([ids, mask, positions, expected])
    longest = max(len(row[0]) for row in rows)
    for row in rows:
        missing = longest - len(row[0])
        for column, filler in zip(row, (0, 0, 0, -100), strict=True):
            column += [filler] * missing
    return [torch.tensor([row[column] for row in rows]) for column in range(4)]


@settings(max_examples=150, deadline=None)
@given(st.lists(row_plans, min_size=1, max_size=3), st.booleans(), st.integers(0, 10**6))
def test_next_token_labels_matches_document_loop(plans, restart_in_padding, seed):
    ids, mask, positions, expected = lay_out(plans, restart_in_padding)
    got = next_token_labels(ids, attention_mask=mask, position_ids=positions)
    assert got.dtype == torch.int64
    assert torch.equal(got, expected)

    hidden_targets = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    labels = (ids + 1000).masked_fill(hidden_targets, -100)
    followed = torch.cat([hidden_targets[:, 1:], torch.ones_like(hidden_targets[:, :1])], dim=1) | (expected == -100)
    assert torch.equal(
        next_token_labels(ids, labels=labels, attention_mask=mask.bool(), position_ids=positions.int(), ignore_index=-1),
        (expected + 1000).masked_fill(followed, -1),
    )


def test_next_token_labels_shifts_by_one():
    labels = next_token_labels(torch.tensor([[5, 6, 7], [8, 9, 3]], dtype=torch.int32))
    assert labels.dtype == torch.int64
    assert labels.tolist() == [[6, 7, -100], [9, 3, -100]]
    assert next_token_labels(torch.tensor([[5], [6]])).tolist() == [[-100], [-100]]
    assert next_token_labels(torch.empty(2, 0, dtype=torch.int64)).shape == (2, 0)


def test_next_token_labels_padding_sides():
    ids = torch.tensor([[5, 6, 7, 0, 0], [0, 0, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    expected = [[6, 7, -100, -100, -100], [-100, -100, 6, 7, -100]]
    assert next_token_labels(ids, attention_mask=mask).tolist() == expected
    # The positions which generation makes for left padding (ones at padding) mean no boundary between real tokens.
    positions = torch.tensor([[0, 1, 2, 1, 1], [1, 1, 0, 1, 2]])
    assert next_token_labels(ids, attention_mask=mask, position_ids=positions).tolist() == expected


def test_next_token_labels_packing_boundaries():
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    # One-token documents, and a document which was cut off at its start, end the one before them too.
    assert next_token_labels(ids, position_ids=torch.tensor([[0, 1, 0, 0, 1]])).tolist() == [[6, -100, -100, 9, -100]]
    assert next_token_labels(ids, position_ids=torch.tensor([[0, 1, 4, 5, 6]])).tolist() == [[6, -100, 8, 9, -100]]
    two = next_token_labels(ids.expand(2, -1), position_ids=torch.tensor([[0, 1, 0, 1, 2]]))
    assert two.tolist() == [[6, -100, 8, 9, -100]] * 2


@pytest.mark.parametrize(
    ("error", "message", "ids", "others"),
    [
        (ValueError, r"input_ids has shape \(4,\), wanted \(batch, sequence\)", torch.zeros(4).long(), {}),
        (TypeError, "input_ids has dtype torch.float32", torch.zeros(2, 4), {}),
        (TypeError, "input_ids has dtype torch.bool", torch.zeros(2, 4).bool(), {}),
        (ValueError, r"labels has shape \(2, 3\), wanted \(2, 4\)", torch.zeros(2, 4).long(), {"labels": torch.zeros(2, 3).long()}),
        (TypeError, "labels has dtype torch.float32", torch.zeros(2, 4).long(), {"labels": torch.zeros(2, 4)}),
        (ValueError, "attention_mask has shape", torch.zeros(2, 4).long(), {"attention_mask": torch.ones(2, 1, 4, 4).long()}),
        (ValueError, "attention_mask has shape", torch.zeros(2, 4).long(), {"attention_mask": torch.ones(1, 4).long()}),
        (
            TypeError,
            "attention_mask has dtype torch.float32, wanted bool or an",
            torch.zeros(2, 4).long(),
            {"attention_mask": torch.ones(2, 4)},
        ),
        (ValueError, r"wanted \(1, 4\) or \(2, 4\)", torch.zeros(2, 4).long(), {"position_ids": torch.zeros(3, 2, 4).long()}),
        (TypeError, "position_ids has dtype torch.bool", torch.zeros(2, 4).long(), {"position_ids": torch.zeros(2, 4).bool()}),
        (ValueError, "labels is on meta, wanted cpu", torch.zeros(2, 4).long(), {"labels": torch.zeros(2, 4, device="meta").long()}),
    ],
)
def test_next_token_labels_refuses_wrong_inputs(error, message, ids, others):
    with pytest.raises(error, match=message):
        next_token_labels(ids, **others)


def test_next_token_labels_compiles_without_graph_breaks():
    compiled = torch.compile(next_token_labels, backend="eager", fullgraph=True)
    for plans in ([[(1, 3), (0, 2)], [(0, 4)]], [[(2, 2)], [(0, 1), (1, 4)], [(0, 3)]]):
        ids, mask, positions, expected = lay_out(plans, True)
        assert torch.equal(compiled(ids, attention_mask=mask, position_ids=positions), expected)


def cross_entropy(model, labels, **batch):
    logits = logits_of(run_backbone(model, **batch))
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def test_next_token_labels_gives_the_loss_of_transformers():
    model = tiny_model("llama")
    ids = tokens(BATCH, LENGTH)
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, 5:] = -100
    with torch.no_grad():
        torch.testing.assert_close(cross_entropy(model, next_token_labels(ids), input_ids=ids), model(input_ids=ids, labels=ids).loss)
        got = cross_entropy(model, next_token_labels(ids, labels=labels), input_ids=ids)
        torch.testing.assert_close(got, model(input_ids=ids, labels=labels).loss)


def test_next_token_labels_packed_loss_is_that_of_separate_documents():
    model = tiny_model("llama")
    documents = [tokens(1, length) for length in (4, 1, 6)]
    packed = torch.cat(documents, dim=1)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    with torch.no_grad():
        separate, count = 0.0, 0
        for document in documents:
            if document.shape[1] > 1:
                separate += model(input_ids=document, labels=document).loss.item() * (document.shape[1] - 1)
                count += document.shape[1] - 1
        # Without an attention_mask, transformers keeps documents apart where position_ids restart.
        got = cross_entropy(model, next_token_labels(packed, position_ids=positions), input_ids=packed, position_ids=positions)
    assert math.isclose(got.item(), separate / count, rel_tol=1e-5)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny_model("llama").save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved_model, tmp_path):
    return shutil.copytree(saved_model, tmp_path / "copy")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_causal_lm_restores_saved_model(folder, dtype):
    model, tokenizer = load_causal_lm(str(folder), dtype=dtype)
    expected = tiny_model("llama").to(dtype)
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))
    assert tokenizer("w5 w7")["input_ids"] == [5, 7]
    assert run_backbone(model, input_ids=torch.tensor([[5, 7]])).hidden.dtype == dtype


def test_load_causal_lm_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"org/name.*downloads nothing"):
        load_causal_lm("org/name")
    with pytest.raises(FileNotFoundError, match="absent"):
        load_causal_lm(tmp_path / "absent")


def edit_config(**changes):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def replace_weights(name, content):
    def edit(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return edit


def only_files(*names):
    def edit(folder):
        shutil.rmtree(folder)
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"GGUF")

    return edit


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (only_files(), "no weights"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type":'), "not a valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "TypeError"),
        (edit_config(model_type="no_such_model"), "no_such_model"),
        (edit_config(model_type="t5", architectures=None), "T5Config"),
        (edit_config(num_attention_heads=0), "ZeroDivisionError"),
        (edit_config(vocab_size="many"), "vocab_size"),
        (edit_config(hidden_size=64), "RuntimeError"),
        (edit_config(num_hidden_layers=3), r"no weights for 9 of the parameters .* model\.layers\.2\."),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"hello"), "SafetensorError"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "SafetensorError"),
        (replace_weights("pytorch_model.bin", b"hello"), "KeyError"),
        (replace_weights("pytorch_model.bin", b""), "EOFError"),
        (replace_weights("pytorch_model.bin", pickle.dumps(shutil.rmtree, protocol=2)), "UnpicklingError"),
        (replace_weights("pytorch_model.bin", b"PK\x03\x04cut"), "RuntimeError"),
        (replace_weights("model.safetensors.index.json", b'{"weight_map": {"a": "b.safetensors"}, "metadata": {}}'), "b.safetensors"),
        (replace_weights("model.safetensors.index.json", b'{"weight_map"'), "JSONDecodeError"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"version":'), "JSONDecodeError"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0"}'), "KeyError"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"added_tokens": [5]}'), "AttributeError"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe"), "UnicodeDecodeError"),
        (only_files("a.gguf", "b.gguf"), "2 .gguf files, wanted one"),
    ],
)
def test_load_causal_lm_names_damaged_folder(folder, damage, reason):
    damage(folder)
    with pytest.raises(ValueError, match=reason) as caught:
        load_causal_lm(folder)
    assert type(caught.value) is ValueError
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"GGUF", b"GGUF\x03\x00\x00\x00" + bytes(16) + b"\xff" * 8])
@pytest.mark.parametrize("by_file", [False, True])
def test_load_causal_lm_names_damaged_gguf(tmp_path, content, by_file):
    pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    path = file if by_file else tmp_path
    with pytest.raises(ValueError, match="cannot be loaded as a causal language model") as caught:
        load_causal_lm(path)
    assert str(path) in str(caught.value)


def test_load_causal_lm_refuses_other_files(folder):
    with pytest.raises(ValueError, match=r"not a \.gguf"):
        load_causal_lm(folder / "config.json")


def test_load_causal_lm_says_how_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "distill_kernels\[models\]"'):
        load_causal_lm(folder)
