"""Offline teachers: what is read is what the teacher said, of the rows that were asked for, or else there is a sentence."""

import copy
import json
import math
import pickle
import shutil

import pytest
import torch
from cache_writer import OPTIONS, VOCABULARY, WIDTH, contents, matrix, rows, teacher
from document_blocks import run_python_blocks
from torch.utils.data import DataLoader

import distill_kernels
from distill_kernels import TeacherCache, write_teacher_cache
from distill_kernels.api.cache import int8_rows, token_rows
from distill_kernels.api.cache.layout import CacheError, shard_grid
from distill_kernels.api.cache.token_rows import TokenRows
from distill_kernels.estimators import quantised

pytest.importorskip("safetensors")


def logits_of(hidden, output, temperature):
    """float64, from what is multiplied."""
    logits = output.logit_scale * (hidden.double() @ output.weight.double().T + (0 if output.bias is None else output.bias.double()))
    return (logits if output.softcap is None else output.softcap * torch.tanh(logits / output.softcap)) / temperature


def assert_close(found, truth, logits):
    """To what rounding logits to float32 a few times costs."""
    most = max(float(logits.abs().max()), float(truth.abs().max()))
    torch.testing.assert_close(found.double(), truth.double(), rtol=0, atol=8 * torch.finfo(torch.float32).eps * most)


def write(folder, run=teacher, data=None, **options):
    write_teacher_cache(run, rows() if data is None else data, folder, **{**OPTIONS, **options})
    return TeacherCache.open(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A cache that no test may change."""
    return write(tmp_path_factory.mktemp("whole") / "cache")


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole.path, tmp_path / "cache")


def all_rows(cache):
    return cache.collate([cache.row(row) for row in range(len(cache))])


# What is kept


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("options", [{}, {"bias": False, "softcap": None}, {"dtype": torch.bfloat16}], ids=["cap", "plain", "bfloat16"])
def test_hidden_states_and_their_sums_are_those_of_the_teacher(tmp_path, options, dtype, temperature):
    cache = write(tmp_path, lambda **batch: teacher(**batch, **options), dtype=dtype, temperature=temperature)
    batch = all_rows(cache)
    read, live = cache.teacher_output(batch), teacher(batch["input_ids"], **options)
    mask = batch["attention_mask"] == 1
    head = cache.head
    assert torch.equal(head.weight, live.weight) and (head.logit_scale, head.softcap) == (live.logit_scale, live.softcap)
    assert (head.bias is None and live.bias is None) or torch.equal(head.bias, live.bias)
    assert read.hidden.dtype is live.weight.dtype and read.temperature == temperature
    if dtype == "int8":
        # Each of the 64 turned entries is off by half a step; turning back leaves the length of the error.
        step = quantised.quantise(live.hidden[mask], "int8")[1][:, 0]
        most = 0.5 * step * math.sqrt(64) + 2.0**-8 * live.hidden[mask].float().norm(dim=-1) * (live.weight.dtype is torch.bfloat16)
        assert bool(((read.hidden - live.hidden)[mask].float().norm(dim=-1) <= most).all())
        assert float(((read.hidden - live.hidden)[mask].float().norm(dim=-1) / live.hidden[mask].float().norm(dim=-1)).mean()) < 0.01
    else:
        assert torch.equal(read.hidden[mask], live.hidden[mask].to(getattr(torch, dtype)).to(live.hidden.dtype))
    assert not read.hidden[~mask].any() and not read.logsumexp[~mask].any()
    # Of what is read, so that exp(y − logsumexp) sums to 1.
    logits = logits_of(read.hidden[mask], live, temperature)
    truth, logp = logits.logsumexp(-1), logits.log_softmax(-1)
    assert_close(read.logsumexp[mask], truth, logits)
    assert_close(read.entropy[mask], -(logp.exp() * logp).sum(-1), logits)


@pytest.mark.parametrize("top_k", [1, 7, VOCABULARY])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("options", [{}, {"bias": False, "softcap": None, "dtype": torch.bfloat16}], ids=["cap", "bfloat16"])
def test_top_k_are_the_most_probable_and_the_tail_is_the_rest(tmp_path, options, dtype, top_k):
    cache = write(tmp_path, lambda **batch: teacher(**batch, **options), kind="top-k", top_k=top_k, dtype=dtype, temperature=1.5)
    batch = all_rows(cache)
    read, mask = cache.teacher_output(batch), batch["attention_mask"] == 1
    live = teacher(batch["input_ids"], **options)
    logits = logits_of(live.hidden, live, 1.5)
    truth = logits.log_softmax(-1)
    wanted = truth.topk(top_k)
    assert read.top_ids.dtype is torch.int64 and bool((read.top_ids[~mask] == -1).all())
    if dtype == "float16":
        torch.testing.assert_close(read.top_logprobs[mask].double(), wanted.values[mask], rtol=2.0**-10, atol=1e-6)
    else:
        assert_close(read.top_logprobs[mask], wanted.values[mask], logits)
    # Ids may differ where probabilities tie in float32.
    assert_close(truth.gather(-1, read.top_ids.clamp(min=0))[mask], wanted.values[mask], logits)
    listed = torch.zeros_like(truth).scatter_(-1, wanted.indices, 1.0)
    torch.testing.assert_close(read.tail_mass[mask].double(), (truth.exp() * (1 - listed)).sum(-1)[mask], rtol=1e-5, atol=1e-12)


def test_chunks_of_tokens_make_no_difference_to_the_top_k(tmp_path):
    """A workspace of 1 MiB has room for the logits of a single token, of a vocabulary of which nearly all is out of reach."""
    plain = {"bias": False, "softcap": None}

    def wide(**batch):
        output = teacher(**batch, **plain)
        weight = torch.cat((output.weight, torch.zeros(2**16, WIDTH)))
        bias = torch.cat((torch.zeros(VOCABULARY), torch.full((2**16,), -1e4)))
        return distill_kernels.BackboneOutput(output.hidden, weight, bias, output.logit_scale, None)

    caches = [
        write(tmp_path / "chunked", wide, kind="top-k", top_k=6, workspace_mib=1),
        write(tmp_path / "whole", lambda **batch: teacher(**batch, **plain), kind="top-k", top_k=6),
    ]
    found, wanted = (cache.teacher_output(all_rows(cache)) for cache in caches)
    assert torch.equal(found.top_ids, wanted.top_ids)
    assert_close(found.top_logprobs, wanted.top_logprobs, torch.tensor(20.0))
    torch.testing.assert_close(found.tail_mass, wanted.tail_mass, rtol=1e-4, atol=1e-9)


def test_outlier_channels_cost_int8_rows_no_accuracy():
    """As hidden states of language models have them: with a step for the plain row the error would be sixty times larger."""
    hidden = matrix(5, 200, 100)
    hidden[:, 7] *= 300
    restored = int8_rows.restore(*int8_rows.quantise(hidden), 100)
    others = torch.arange(100) != 7
    plain = hidden.abs().amax(1, keepdim=True) / 127 / math.sqrt(12)
    assert float((restored - hidden)[:, others].square().mean().sqrt()) < 0.2 * float(plain.square().mean().sqrt())


# Distilling from it


@pytest.fixture(scope="module")
def models():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)

    def model(width, **options):
        config = transformers.LlamaConfig(
            vocab_size=211, hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2,
            max_position_embeddings=64, **options,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    return model(48, tie_word_embeddings=True).bfloat16().eval(), model(32)


def gradients(student, batch, teacher_arguments, **options):
    student.zero_grad()
    learned = distill_kernels.run_backbone(student, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    labels = distill_kernels.next_token_labels(batch["input_ids"], attention_mask=batch["attention_mask"])
    loss = distill_kernels.distillation_loss(**learned.as_student(), **teacher_arguments, labels=labels, **options)
    (3 * loss).backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in student.parameters())]


@pytest.mark.parametrize("lengths", [(16, 16, 16, 16), (5, 16, 9, 12)], ids=["whole windows", "ragged rows"])
def test_distilling_from_a_bfloat16_cache_is_distilling_from_the_teacher(tmp_path, models, lengths):
    model, student = models
    data = [torch.randint(211, (length,), generator=torch.Generator().manual_seed(length + i)) for i, length in enumerate(lengths)]
    write_teacher_cache(model, data, tmp_path, batch_size=4)
    cache = TeacherCache.open(tmp_path, vocabulary=211, rows=data)
    (batch,) = DataLoader(cache.dataset(), batch_size=4, collate_fn=cache.collate)
    with torch.no_grad():
        live = distill_kernels.run_backbone(model, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    options = {"divergence": "reverse_kl", "temperature": 2.0, "ce_weight": 0.5}
    cached = gradients(student, batch, cache.teacher_output(batch).as_teacher(), **options)
    wanted = gradients(student, batch, live.as_teacher(), **options)
    assert float(wanted[0]) > 0.1 and all(map(torch.equal, cached, wanted))


def test_a_top_k_cache_of_everything_is_the_teacher_too(tmp_path, models):
    model, student = models
    model = copy.deepcopy(model).float()
    data = torch.randint(211, (4, 12), generator=torch.Generator().manual_seed(0))
    write_teacher_cache(model, data, tmp_path, kind="top-k", top_k=211, temperature=2.0, batch_size=3, shard_mib=0.02)
    cache = TeacherCache.open(tmp_path)
    batch = all_rows(cache)
    learned = distill_kernels.run_backbone(student, input_ids=batch["input_ids"]).as_student()
    weights = matrix(9, 4, 12)
    sparse = distill_kernels.sparse_distillation_loss(
        **learned, **cache.teacher_output(batch).as_sparse_teacher("ignore"), temperature=2.0, reduction="none"
    )
    live = distill_kernels.run_backbone(model, input_ids=data).as_teacher()
    full = distill_kernels.distillation_loss(**learned, **live, temperature=2.0, reduction="none")
    torch.testing.assert_close(sparse, full, rtol=1e-4, atol=1e-5)
    parameters = list(student.parameters())
    found, wanted = (torch.autograd.grad((loss * weights).sum(), parameters, retain_graph=True) for loss in (sparse, full))
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm()) <= 1e-4 * float(other.norm())


@pytest.mark.parametrize("tail", ["bucket", "renormalise", "ignore"])
def test_a_top_k_cache_is_what_sparse_losses_take(tmp_path, models, tail):
    model, student = models
    write_teacher_cache(model, rows(), tmp_path, kind="top-k", top_k=5, dtype="float16", temperature=2.0)
    cache = TeacherCache.open(tmp_path)
    batch = all_rows(cache)
    learned = distill_kernels.run_backbone(student, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).as_student()
    labels = distill_kernels.next_token_labels(batch["input_ids"], attention_mask=batch["attention_mask"])
    arguments = cache.teacher_output(batch).as_sparse_teacher(tail)
    loss = distill_kernels.sparse_distillation_loss(**learned, **arguments, labels=labels, temperature=2.0)
    assert math.isfinite(loss.item())
    if tail == "bucket":
        assert torch.equal(arguments["teacher_tail_mass"], cache.teacher_output(batch).tail_mass)
        with pytest.raises(ValueError, match="temperature"):
            distill_kernels.sparse_distillation_loss(**learned, **arguments, labels=labels, temperature=1.0)


def test_the_other_kind_of_loss_is_refused(whole, tmp_path):
    with pytest.raises(CacheError, match="use distillation_loss"):
        whole.teacher_output(all_rows(whole)).as_sparse_teacher("bucket")
    sparse = write(tmp_path, kind="top-k", top_k=3)
    with pytest.raises(CacheError, match="use sparse_distillation_loss"):
        sparse.teacher_output(all_rows(sparse)).as_teacher()
    with pytest.raises(CacheError, match="which has no head"):
        _ = sparse.head


# Reading rows


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.exhaustive)])
def test_workers_read_what_one_process_reads(whole, context):
    whole.row(0)  # so that a shard is open when the workers are forked
    alone = list(DataLoader(whole.dataset(), batch_size=3, collate_fn=whole.collate))
    for _ in range(1 if context == "spawn" else 2):
        workers = DataLoader(whole.dataset(), batch_size=3, collate_fn=whole.collate, num_workers=2, multiprocessing_context=context)
        for one, other in zip(alone, workers, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_cache_that_was_sent_to_another_process_reads_the_same(whole):
    whole.teacher_output(all_rows(whole))
    sent = pickle.dumps(whole)
    assert len(sent) < 4000, "files and head are not sent along"
    assert torch.equal(pickle.loads(sent).row(9)["teacher_hidden"], whole.row(9)["teacher_hidden"])


def test_many_shards_are_open_a_few_at_a_time(tmp_path, monkeypatch):
    cache = write(tmp_path, shard_mib=1e-6)
    assert cache.plan.shard_rows == (1,) * 14
    monkeypatch.setattr("distill_kernels.api.cache.mapped_shards.OPEN_SHARDS", 3)
    for row in (0, 13, 5, 0, 7, 2, 13):
        assert torch.equal(cache.row(row)["input_ids"], rows()[row])
    assert len(cache._shards.opened) == 3


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_found_by_their_token_ids(whole, side):
    """A loop with batches of its own, padded on either side, of which only input_ids and attention_mask are known."""
    order = torch.tensor([11, 2, 7, 7])
    chosen = [whole.row(int(row)) for row in order]
    given = whole.collate(chosen)
    width = given["input_ids"].shape[1]
    batch = {"input_ids": torch.full((4, width), 50), "attention_mask": torch.zeros(4, width, dtype=torch.bool)}
    for i, row in enumerate(chosen):
        n = len(row["input_ids"])
        place = slice(0, n) if side == "right" else slice(width - n, width)
        batch["input_ids"][i, place], batch["attention_mask"][i, place] = row["input_ids"], True
    wanted, mask = whole.teacher_output(given), given["attention_mask"] == 1
    for found in (whole.teacher_output(batch), whole.teacher_output(batch | {"row": order})):
        for name in ("hidden", "logsumexp", "entropy"):
            assert torch.equal(getattr(found, name)[batch["attention_mask"]], getattr(wanted, name)[mask])
            assert not getattr(found, name)[~batch["attention_mask"]].any()


def test_batches_without_a_mask_are_whole_rows(tmp_path):
    data = torch.randint(VOCABULARY, (5, 8), generator=torch.Generator().manual_seed(0))
    cache = write(tmp_path, data=data)
    found = cache.teacher_output({"input_ids": data[[3, 1]]})
    assert torch.equal(found.hidden, teacher(data[[3, 1]]).hidden.bfloat16().float())


def other_ids(batch):
    changed = batch["input_ids"].clone()
    changed[1, 0] = (changed[1, 0] + 1) % VOCABULARY
    return batch | {"input_ids": changed}


@pytest.mark.parametrize(
    "change, match",
    [
        (other_ids, r"row 1 of the batch has other token ids than row 1 of .*cache"),
        (lambda batch: {**other_ids(batch), "row": None}, r"row 1 of the batch, \d+ token ids beginning \d+, .*is in no row of"),
        (lambda batch: batch | {"row": batch["row"].flip(0)}, "row 0 of the batch has other token ids than row 13"),
        (lambda batch: batch | {"row": batch["row"] + 1}, "has 14 rows, there is no row 14"),
        (lambda batch: batch | {"row": batch["row"][:3]}, "the batch has 14 rows but 3 row numbers"),
        (lambda batch: batch | {"attention_mask": batch["attention_mask"].flip(1)}, "padded on the right, but its attention_mask is not"),
        (lambda batch: batch | {"attention_mask": batch["attention_mask"][:, :1]}, "attention_mask has shape"),
        (lambda batch: batch | {"input_ids": batch["input_ids"].float()}, '"input_ids" of shape .* torch.float32, wanted integers'),
        (lambda batch: batch | {"input_ids": None}, '"input_ids" of NoneType'),
        (lambda batch: batch | {"teacher_entropy": None}, "but not teacher_entropy; it is of another cache"),
    ],
)
def test_a_batch_of_other_rows_is_refused_by_name(whole, change, match):
    with pytest.raises(CacheError, match=match):
        whole.teacher_output(change(all_rows(whole)))


def test_rows_out_of_range_are_index_errors(whole):
    for row in (-1, 14):
        with pytest.raises(IndexError, match=f"14 rows, there is no row {row}"):
            whole.row(row)
        with pytest.raises(IndexError):
            rows_of = TokenRows.of(rows())
            rows_of[row]


# Another data set, tokenizer or vocabulary


class Tokenizer:
    def __init__(self, **vocabulary):
        self.get_vocab = lambda: vocabulary


def test_a_cache_of_something_else_is_refused(tmp_path):
    data = rows()
    cache = write(tmp_path, tokenizer=Tokenizer(a=0, b=1))
    TeacherCache.open(tmp_path, tokenizer=Tokenizer(b=1, a=0), vocabulary=VOCABULARY, rows=data)
    with pytest.raises(CacheError, match="is of another tokenizer"):
        TeacherCache.open(tmp_path, tokenizer=Tokenizer(a=1, b=0))
    with pytest.raises(CacheError, match=f"a teacher with {VOCABULARY} vocabulary entries, wanted 96"):
        TeacherCache.open(tmp_path, vocabulary=96)
    for other in ([*data[1:], data[0]], data[:-1], [data[0] + 1, *data[1:]], [torch.cat(data[:2]), *data[2:]]):
        with pytest.raises(CacheError, match=f"is of another data set: it has 14 rows of {cache.plan.tokens} tokens, wanted"):
            TeacherCache.open(tmp_path, rows=other)


def test_a_cache_without_a_tokenizer_cannot_be_compared(whole):
    with pytest.raises(CacheError, match="was written without its tokenizer"):
        TeacherCache.open(whole.path, tokenizer=Tokenizer(a=0))


def test_a_student_with_another_vocabulary_is_refused_by_the_loss(whole):
    batch = all_rows(whole)
    hidden = torch.randn(*batch["input_ids"].shape, 8)
    with pytest.raises(ValueError, match="student_weight has 90 rows but teacher_weight has 97"):
        distill_kernels.distillation_loss(hidden, torch.randn(90, 8), **whole.teacher_output(batch).as_teacher())


# Damage


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def offset_in_file(path, tensor):
    data = path.read_bytes()
    header = int.from_bytes(data[:8], "little")
    return 8 + header + json.loads(data[8 : 8 + header])[tensor]["data_offsets"][0]


def reopened(match, folder, error=CacheError):
    with pytest.raises(error, match=match):
        TeacherCache.open(folder)


def test_a_changed_byte_anywhere_is_found_by_verify(copied):
    cache = TeacherCache.open(copied)
    cache.verify()
    for name, tensor in (("shard-00002.safetensors", "hidden"), ("head.safetensors", "weight"), ("shard-00001.safetensors", "entropy")):
        before = (copied / name).read_bytes()
        flip(copied / name, offset_in_file(copied / name, tensor))
        with pytest.raises(CacheError, match=f"contents of {name} have changed"):
            TeacherCache.open(copied).verify()
        (copied / name).write_bytes(before)
    cache.verify()


def test_changed_token_ids_are_found_when_their_row_is_read(copied):
    path = copied / "shard-00001.safetensors"
    flip(path, offset_in_file(path, "token_ids"))
    cache = TeacherCache.open(copied)
    first = cache.plan.first_rows[1]
    cache.row(first + 1)
    with pytest.raises(CacheError, match=rf"row {first} of .* is damaged: its token ids in shard-00001.safetensors"):
        cache.row(first)


def test_changed_offsets_are_found_when_their_shard_is_opened(copied):
    path = copied / "shard-00001.safetensors"
    flip(path, offset_in_file(path, "offsets"))
    with pytest.raises(CacheError, match=r"shard-00001.safetensors is damaged: its rows do not fit its tokens"):
        TeacherCache.open(copied).row(6)


def test_truncated_and_missing_files_are_named(copied):
    path = copied / "shard-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    reopened(rf"shard-00002.safetensors has {len(data) - 5} bytes where {len(data)} were written", copied)
    path.write_bytes(bytes(len(data)))
    reopened("shard-00002.safetensors cannot be read", copied)
    path.unlink()
    reopened("shard-00002.safetensors is missing", copied)
    path.write_bytes(data)
    (copied / "head.safetensors").unlink()
    reopened("head.safetensors is missing", copied)


def test_swapped_shards_are_named(copied, tmp_path):
    """Of one size and one shape."""
    data = torch.randint(VOCABULARY, (8, 8), generator=torch.Generator().manual_seed(0))
    cache = write(tmp_path / "even", data=data, shard_mib=0.002)
    first, second = (cache.path / f"shard-0000{i}.safetensors" for i in (0, 1))
    a, b = first.read_bytes(), second.read_bytes()
    assert len(a) == len(b)
    first.write_bytes(b)
    second.write_bytes(a)
    reopened("shard-00000.safetensors is not the file that was written here: it says that it is shard 1", cache.path)


def test_shards_of_another_cache_are_named(copied, tmp_path):
    """Left from before: the same shape, another teacher."""
    stale = write(tmp_path / "stale", fingerprint="an older teacher")
    shutil.copy(stale.path / "shard-00001.safetensors", copied)
    reopened("shard-00001.safetensors is not the file that was written here: it is of another cache", copied)


def test_files_of_something_else_are_named(copied):
    from safetensors.torch import load_file, save_file

    path = copied / "shard-00001.safetensors"
    size = path.stat().st_size
    tensors = load_file(path)
    save_file(tensors, path)
    path.write_bytes(path.read_bytes().ljust(size, b" ")[:size])
    index = json.loads((copied / "index.json").read_text())
    save_file(tensors, path)
    index["files"][2]["bytes"] = path.stat().st_size
    (copied / "index.json").write_text(json.dumps(index))
    reopened("shard-00001.safetensors is not the file that was written here: it says nothing of a teacher cache", copied)


@pytest.mark.parametrize(
    "damage, match",
    [
        (lambda index: index[:-20], "index.json is damaged: it is not JSON"),
        (lambda index: index.replace('"version": 1', '"version": 2'), "is of version 2 of the format, and this library reads version 1"),
        (lambda index: index.replace("teacher cache", "recipe"), "is not the index of a teacher cache"),
        (lambda index: index.replace('"temperature"', '"heat"'), "is damaged: TypeError"),
        (lambda index: index.replace('"kind": "hidden"', '"kind": "logits"'), "its plan does not make sense"),
        (lambda index: index.replace("shard-00002", "shard-00009"), "its list of files does not fit its plan"),
        (lambda index: index.replace('"hidden_dim": 24', '"hidden_dim": 25'), "head.safetensors is not the file that was written here"),
        (lambda index: "[]", "is not the index"),
    ],
)
def test_a_damaged_index_is_named(copied, damage, match):
    path = copied / "index.json"
    before = path.read_text()
    assert damage(before) != before
    path.write_text(damage(before))
    reopened(match, copied)


def test_a_folder_without_a_cache_is_refused(tmp_path):
    reopened("holds no teacher cache: there is no index.json", tmp_path)
    reopened("holds no teacher cache", tmp_path / "nowhere")


# Rows and shards


def test_the_shard_grid_holds_whole_rows():
    shard_rows, shard_tokens = shard_grid(torch.tensor([4, 4, 4, 11, 1, 1, 9, 30, 2]), token_bytes=10, shard_bytes=120)
    assert shard_rows == (3, 2, 2, 1, 1) and shard_tokens == (12, 12, 10, 30, 2)


def test_documents_are_cut_into_rows_that_span_none():
    def tokenizer(document, add_special_tokens, verbose):
        assert not add_special_tokens and not verbose
        return {"input_ids": [ord(letter) for letter in document]}

    cut = token_rows.cut(["abcdefg", "hij", "klmno", "p"], tokenizer, 4)
    assert ["".join(map(chr, row.tolist())) for row in cut] == ["abcd", "efg", "hij", "klmn"]
    with pytest.raises(CacheError, match="no row of two tokens"):
        token_rows.cut(["a", "b"], tokenizer, 4)


def test_nothing_is_pickled(whole):
    for name, data in contents(whole.path).items():
        if name.endswith(".json"):
            json.loads(data)
        else:
            header = int.from_bytes(data[:8], "little")
            ends = [entry["data_offsets"][1] for key, entry in json.loads(data[8 : 8 + header]).items() if key != "__metadata__"]
            assert name.endswith(".safetensors") and 8 + header + max(ends) == len(data), "tensors and nothing else"


def test_the_documentation_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    namespace = run_python_blocks("docs/offline-teachers.md", at_least=4)
    assert namespace["report"].complete and float(namespace["loss"].detach()) > 0
    assert any(parameter.grad.abs().sum() > 0 for parameter in namespace["student"].parameters())
