import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import BATCH, LENGTH, logits_of, tokens
from torch import nn

from benchmarks.models.tiny import tiny_model
from distill_kernels.api.models.backbone import run_backbone
from distill_kernels.api.models.labels import next_token_labels

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
