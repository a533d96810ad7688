"""`distill-kernels cache`: from a text to a cache, on one process and on two."""

import json
import subprocess
import sys

import pytest
import torch
from cache_writer import contents

from distill_kernels import TeacherCache
from distill_kernels.api.command_line import main, parser
from distill_kernels.api.models.loading import load_causal_lm

for package in ("transformers", "tqdm", "safetensors"):
    pytest.importorskip(package)

WORDS = [f"{first}{second}" for first in "bdfgklmn" for second in "aeiou"]  # 40


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["?", *WORDS])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    documents = [" ".join(WORDS[(7 * i + j * j) % 40] for j in range(3 + 5 * i)) for i in range(8)]
    path.write_text("\n".join(json.dumps({"story": document}) for document in documents))
    return path


def flags(teacher, text, output, *more):
    options = ["--teacher", teacher, "--text", text, "--text-field", "story", "--output", output]
    return list(map(str, ["cache", *options, "--sequence-length", 16, "--batch-size", 2, "--shard-mib", 0.002, *more]))


def test_a_text_becomes_a_cache_with_its_size_said_before(teacher, text, tmp_path, capsys):
    assert main(flags(teacher, text, tmp_path / "cache", "--predict")) == 0
    predicted = capsys.readouterr().out
    assert "14 rows of 163 tokens: at most 0.0 MiB in 9 shards" in predicted and not (tmp_path / "cache").exists()
    assert main(flags(teacher, text, tmp_path / "cache")) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{predicted}{tmp_path / 'cache'} is complete\n" and "163" in printed.err
    model, tokenizer = load_causal_lm(teacher)
    cache = TeacherCache.open(tmp_path / "cache", tokenizer=tokenizer, vocabulary=64)
    batch = cache.collate([cache.row(row) for row in range(len(cache))])
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    read = cache.teacher_output(batch)
    mask = batch["attention_mask"] == 1
    torch.testing.assert_close((read.hidden @ read.head.weight.T)[mask], logits[mask], rtol=0.01, atol=0.01)
    assert main(flags(teacher, text, tmp_path / "cache")) == 0
    assert "9 shards, of which 9 are there" in capsys.readouterr().out


def test_json_is_json_alone(teacher, text, tmp_path, capsys):
    options = ["--kind", "top-k", "--top-k", "4", "--temperature", "2", "--json"]
    assert main(flags(teacher, text, tmp_path / "cache", *options)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["complete"] and report["rows"] == 14 and report["shards_written"] == report["shards"]
    assert TeacherCache.open(tmp_path / "cache").plan.temperature == 2.0
    assert main(["cache", "--output", str(tmp_path / "cache"), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "top-k"


@pytest.mark.exhaustive
def test_two_ranks_of_torchrun_write_what_one_process_does(teacher, text, tmp_path):
    program = ["-m", "distill_kernels.api.command_line"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([sys.executable, *torchrun, *program, *flags(teacher, text, tmp_path / "two", "--json")], check=True, timeout=1800)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(flags(teacher, text, tmp_path / "one")) == 0
    torch.set_num_threads(threads)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_mistakes_are_one_sentence(teacher, text, tmp_path, capsys):
    def refused(arguments, words):
        assert main(arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("distill-kernels: ") and words in error, error

    output = tmp_path / "cache"
    refused(["cache", "--output", str(output)], "--text FILE is required")
    refused(flags(teacher, tmp_path / "nothing.txt", output), "nothing.txt cannot be read")
    refused(flags(tmp_path, text, output), "--teacher: ")
    refused(flags(teacher, text, output, "--kind", "top-k"), "top_k is None")
    refused(flags(teacher, text, output, "--dtype", "int4"), "got 'int4'")
    refused(flags(teacher, text, output, "--temperature", "0"), "temperature")
    refused(flags(teacher, text, output, "--sequence-length", "1"), "at least 2")
    refused(["cache", "--output", str(output), "--verify"], "holds no teacher cache")
    assert not output.exists()
    assert main(flags(teacher, text, output)) == 0
    refused(flags(teacher, text, output, "--dtype", "int8"), "holds a cache of dtype 'bfloat16' where 'int8' is wanted")
    path = output / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    refused(["cache", "--output", str(output), "--verify"], "shard-00000.safetensors have changed")


def test_interruption_says_what_is_kept(teacher, text, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("distill_kernels.api.cache.writing._shard", interrupt)
    assert main(flags(teacher, text, tmp_path / "cache")) == 130
    assert "interrupted; whole shards are kept, and the same command goes on" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(flags(teacher, text, tmp_path / "cache")) == 0 and len(TeacherCache.open(tmp_path / "cache")) == 14


def test_help_has_an_example_that_parses(capsys):
    with pytest.raises(SystemExit):
        main(["cache", "--help"])
    example = capsys.readouterr().out.partition("example:\n  distill-kernels ")[2].split()
    assert parser().parse_args(example).dtype == "int8"
