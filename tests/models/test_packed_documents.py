"""Documents packed into one row: kept apart as they are alone, or refused in words, by architecture, attention and inputs."""

import pytest
import torch
from thinned import some

from benchmarks.models.tiny import VOCAB, there, tiny_model
from distill_kernels.api.models import packed_documents
from distill_kernels.api.models.backbone import run_backbone

LENGTHS = (7, 9, 5)


def documents(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def flattened(texts, start=0, **more):
    """As DataCollatorWithFlattening lays them out."""
    return {
        "input_ids": torch.cat(texts)[None],
        "position_ids": torch.cat([torch.arange(start, start + len(text)) for text in texts])[None],
        **more,
    }


def boundaries(texts):
    """What the collator adds if it is asked to."""
    lengths = torch.tensor([len(text) for text in texts])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    longest = int(lengths.max())
    return {
        "seq_idx": torch.repeat_interleave(torch.arange(len(texts)), lengths)[None].int(),
        "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def pairs(**attentions):
    return {f"{name}-{attention}": (name, attention) for attention, names in attentions.items() for name in there(names.split())}


APART = pairs(
    sdpa="llama gpt2 gemma3_text mixtral deepseek_v3 phi3 olmo2 cohere2 qwen3_moe",
    eager="llama gemma2 granite_swa gpt_neo",
)
TOGETHER = pairs(
    eager="gpt_oss bloom mpt jamba recurrent_gemma",
    sdpa="bamba falcon_h1 jamba qwen3_next opt afmoe minimax zaya",
)


@pytest.mark.parametrize(
    ("model_type", "attention"), some(APART, ["llama-sdpa", "gpt2-sdpa", "gemma3_text-sdpa", "mixtral-sdpa", "gemma2-eager"])
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_that_are_kept_apart_are_taken(model_type, attention, dtype):
    model = tiny_model(model_type, attn_implementation=attention).to(dtype).train()
    texts = documents()
    with torch.no_grad():
        run_backbone(model, **flattened(texts))  # with dropout, which the check is without
        assert packed_documents._checked[model]
        got = run_backbone(model.eval(), **flattened(texts)).hidden[0].split(LENGTHS)
        for text, hidden in zip(texts, got, strict=True):
            alone = run_backbone(model, input_ids=text[None]).hidden[0]
            assert (hidden.float() - alone.float()).norm() <= (1e-5 if dtype == torch.float32 else 0.05) * alone.float().norm()


@pytest.mark.parametrize(("model_type", "attention"), some(TOGETHER, ["gpt_oss-eager", "bloom-eager", "bamba-sdpa", "opt-sdpa"]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_that_see_each_other_are_refused(model_type, attention, dtype):
    model = tiny_model(model_type, attn_implementation=attention).to(dtype).train()
    message = rf"attention implementation '{attention}', does not keep documents apart.*by [01]\.?\d* of .*Pad instead.*return_seq_idx=True"
    with pytest.raises(ValueError, match=message):
        run_backbone(model, **flattened(documents()))
    assert model.training
    # Followed, the advice works.
    padded = torch.nn.utils.rnn.pad_sequence(documents(), batch_first=True)
    assert run_backbone(model, input_ids=padded, attention_mask=(padded != 0).long()).hidden.shape[:2] == (3, 9)


def test_a_mask_that_makes_documents_one_is_named():
    model, texts = tiny_model("llama"), documents()
    batch = flattened(texts, attention_mask=torch.ones(1, sum(LENGTHS), dtype=torch.int64))
    with pytest.raises(ValueError, match=r"come with an attention_mask: .*; leave attention_mask out of packed batches, then it does"):
        run_backbone(model, **batch)
    del batch["attention_mask"]
    run_backbone(model, **batch)


def test_masks_of_blocks_are_taken():
    model, texts = tiny_model("llama"), documents()
    document = boundaries(texts)["seq_idx"][0]
    blocks = (document[:, None] == document[None]).tril()
    run_backbone(model, **flattened(texts), attention_mask=blocks[None, None])
    whole = torch.ones_like(blocks).tril()
    with pytest.raises(ValueError, match="leave attention_mask out"):
        run_backbone(tiny_model("llama"), **flattened(texts), attention_mask=whole[None, None])


@pytest.mark.parametrize("names", [("seq_idx",), ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")])
def test_documents_are_found_by_whatever_says_where_they_begin(names):
    """Without position_ids, for attention that reads none of the others."""
    texts = documents()
    batch = {"input_ids": torch.cat(texts)[None], **{name: boundaries(texts)[name] for name in names}}
    with pytest.raises(ValueError, match="does not keep documents apart"):
        run_backbone(tiny_model("llama"), **batch)
    both = run_backbone(tiny_model("llama"), **flattened(texts), **{name: boundaries(texts)[name] for name in names})
    torch.testing.assert_close(both.hidden, run_backbone(tiny_model("llama"), **flattened(texts)).hidden)


@pytest.mark.parametrize("lengths", [(1, 1, 4), (100, 70, 3), (5,) * 9])
@pytest.mark.parametrize("start", [0, 3])  # of documents that are cut off at their beginning, too
@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text"])
def test_documents_of_any_length_and_place_are_compared(lengths, start, model_type):
    run_backbone(tiny_model(model_type, max_position_embeddings=128), **flattened(documents(lengths), start=start))
    with pytest.raises(ValueError, match="does not keep documents apart"):
        run_backbone(tiny_model("bloom"), **flattened(documents(lengths), start=start))


def test_padding_is_no_document():
    """position_ids that begin again in padding, or behind it, as generation makes them: nothing is packed, and nothing is run for it."""
    ids = torch.stack(documents((6, 6)))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    positions = torch.tensor([[1, 1, 0, 1, 2, 3], [0, 1, 2, 1, 1, 1]])
    model = tiny_model("bloom")
    run_backbone(model, input_ids=ids, attention_mask=mask)
    runs = []
    model.transformer.register_forward_hook(lambda *_: runs.append(1))
    run_backbone(model, input_ids=ids, attention_mask=mask, position_ids=positions)
    run_backbone(model, input_ids=ids, position_ids=torch.arange(6)[None])
    assert len(runs) == 2


def test_packing_is_checked_once_for_inputs_of_one_kind():
    model, texts = tiny_model("llama"), documents()
    run_backbone(model, input_ids=texts[0][None])
    runs = []
    model.model.register_forward_hook(lambda *_: runs.append(1))
    for expected in (1 + 3 + 1, 1, 1):  # packed, each alone, and what was asked for
        run_backbone(model, **flattened(texts))
        assert len(runs) == expected
        runs.clear()
    model.set_attn_implementation("eager")
    run_backbone(model, **flattened(texts))
    assert len(runs) == 5
