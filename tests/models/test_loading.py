import json
import pickle
import shutil
import socket
import sys

import pytest
import torch
import transformers

from benchmarks.models.tiny import VOCAB, tiny_model
from distill_kernels.api.models.backbone import run_backbone
from distill_kernels.api.models.loading import load_causal_lm


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
