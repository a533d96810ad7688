"""`distill-kernels train` on models of a few thousand parameters: its steps against plain torch, and runs that are stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import WORDS, save_llama, sections

from distill_kernels.api.command_line import main
from distill_kernels.api.models import initial_models
from distill_kernels.api.runs import checkpoints, corpus, loop
from distill_kernels.api.user_error import UserError

for package in ("transformers", "tqdm", "matplotlib", "safetensors"):
    pytest.importorskip(package)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a teacher, a student whose dropout draws random numbers, and a text as plain text and as JSON lines."""
    folder = tmp_path_factory.mktemp("inputs")
    save_llama(folder / "teacher")
    save_llama(folder / "student", layers=2, width=16, seed=1, attention_dropout=0.2)
    (folder / "text.txt").write_text("\n\n".join(sections(30)), encoding="utf-8")
    lines = [json.dumps({"number": number, "body": section}) for number, section in enumerate(sections(30))]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


STEPS = 9


def flags(here, output, *more):
    """Checkpoints after steps 4, 8 and 9; measurements at the start and after 3, 6 and 9."""
    found = ["train", "--student", here / "student", "--output", output, "--steps", STEPS, "--sequence-length", 16, "--batch-size", 4]
    return [str(flag) for flag in [*found, "--evaluate-every", 3, "--checkpoint-every", 4, "--learning-rate", 0.01, *more]]


def taught(here, output, *more):
    return flags(here, output, "--teacher", here / "teacher", "--text", here / "text.txt", *more)


def records(output):
    """The log, but for the time that steps took."""
    lines = (output / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def student_files(output):
    return {path.name: path.read_bytes() for path in (output / "student").iterdir()}


@pytest.fixture(scope="module")
def undisturbed(here, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(taught(here, output)) == 0
    return output


def test_a_run_leaves_a_student_that_loads_and_a_report(undisturbed, here):
    assert sorted(path.name for path in undisturbed.iterdir()) == [".lock", "curves.png", "log.jsonl", "student", "train.json"]
    assert (undisturbed / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    report = json.loads((undisturbed / "train.json").read_text(encoding="utf-8"))
    assert [point["step"] for point in report["curve"]] == [0, 3, 6, 9] and len(report["training_loss"]) == STEPS
    table = report["table"]
    assert table["student after"]["kl"] < table["student before"]["kl"] and table["teacher"]["kl"] < 1e-5
    # What the folder holds is the student that was measured last.
    student, tokenizer = initial_models.load("student", undisturbed / "student")
    teacher, _ = initial_models.load("teacher", here / "teacher")
    documents = corpus.split_documents(here / "text.txt", 0)
    _, held_out, _ = corpus.draw(documents, tokenizer, 16, 4, STEPS, 0, 8192)
    with torch.no_grad():
        log_q, log_p = (F.log_softmax(model(held_out).logits[:, :-1].double(), -1) for model in (student, teacher))
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum") / log_p[..., 0].numel()
    assert table["student after"]["kl"] == pytest.approx(kl.item(), rel=1e-4)


def test_steps_are_those_of_plain_torch(here):
    """Accumulated over parts of a step, with a mixed loss, against logits and torch's own losses."""
    made = [initial_models.load("student", here / "teacher")[0] for _ in range(3)]
    teacher = made.pop().requires_grad_(False)
    ours, plain = (initial_models.cut_student(model, [0, 3]) for model in made)
    ids = torch.randint(300, (12, 10), generator=torch.Generator().manual_seed(0))
    order = corpus.epochs(12, 5, 4, torch.Generator().manual_seed(0))
    options = {"temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.3}
    text = loop.TaughtText(ids, model=teacher)
    losses = [made["loss"] for made in loop.train(ours, text, order, *loop.optimizer_and_schedule(ours, 1e-2, 4), at_once=2, **options)]

    optimizer, schedule = loop.optimizer_and_schedule(plain, 1e-2, 4)
    expected = []
    for rows in order:
        z, y = (model(ids[rows]).logits[:, :-1].flatten(0, 1) for model in (plain, teacher))
        kd = 4 * F.kl_div(F.log_softmax(z / 2, -1), F.log_softmax(y / 2, -1), log_target=True, reduction="batchmean")
        loss = 0.7 * kd + 0.3 * F.cross_entropy(z, ids[rows][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=2e-5)
    for (name, parameter), reference in zip(ours.named_parameters(), plain.parameters(), strict=True):
        # Adam's first steps turn gradients into signs, so that rounding of small ones is what differs.
        assert (parameter - reference).norm() <= 2e-3 * reference.norm(), name


KILLED = """
import os, signal, sys
import safetensors.torch
from distill_kernels.api.command_line import main
import torch
torch.set_num_threads(1)
save, calls = safetensors.torch.save_file, []
def killed(*args, **options):
    calls.extend(path for path in args if str(path).endswith("optimizer.safetensors"))
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # with the model of the second checkpoint written, its optimizer not yet
    return save(*args, **options)
safetensors.torch.save_file = killed
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.exhaustive
def test_a_run_killed_while_it_writes_a_checkpoint_ends_like_an_undisturbed_one(undisturbed, here, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-c", KILLED, *taught(here, output)]
    killed = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in checkpoints.checkpoints(output)] == ["checkpoint-000004"]
    assert (output / ".checkpoint-000008.partial" / "model.safetensors").exists() and len(records(output)) == 9
    with (output / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')  # a line that was cut off
    assert main(taught(here, output, "--resume")) == 0
    assert records(output) == records(undisturbed)
    assert student_files(output) == student_files(undisturbed)
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in undisturbed.iterdir())


@pytest.fixture
def interrupted(here, tmp_path, monkeypatch, capsys):
    """The output of a run that Ctrl-C has ended in its seventh step, and what it said."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def pressed(*args):
        calls.append(args)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return clip(*args)

    # As a terminal gives it: what a shell runs in the background has it ignored, and Python leaves that as it is.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", pressed)
            assert main(taught(here, tmp_path / "run")) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    return tmp_path / "run", capsys.readouterr().err.splitlines()[-1]


def test_an_interrupted_run_says_how_to_go_on_and_does(interrupted, undisturbed, here, capsys):
    output, said = interrupted
    assert said.startswith("distill-kernels: interrupted; the last checkpoint in") and "--resume" in said
    assert [path.name for path in checkpoints.checkpoints(output)] == ["checkpoint-000004"]
    assert main(taught(here, output, "--resume")) == 0
    assert records(output) == records(undisturbed) and student_files(output) == student_files(undisturbed)
    # Once it is finished there is nothing to go on with, and nothing is trained again.
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert main(taught(here, output, "--resume")) == 0 and "is finished" in capsys.readouterr().out
    assert main(taught(here, output, "--resume", "--temperature", 2)) == 2
    assert "train.json is of a run with loss {}, and loss is now {'temperature': 2.0}" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != ".lock"} == {
        path: time for path, time in before.items() if path.name != ".lock"
    }


def test_a_student_without_the_report_of_its_run_is_left_alone(here, tmp_path, capsys):
    (tmp_path / "run" / "student").mkdir(parents=True)
    assert main(taught(here, tmp_path / "run", "--resume")) == 2
    assert "student is of a run whose checkpoints and report are gone; delete it" in capsys.readouterr().err


def test_a_run_goes_on_with_the_same_inputs_alone(interrupted, here, tmp_path, capsys):
    output, _ = interrupted
    kept = student = output / "checkpoint-000004"
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(sections(30, seed=1)), encoding="utf-8")
    for more, words in (
        ([], "holds a run already"),
        (["--resume", "--learning-rate", 0.02], "with learning_rate 0.01, and learning_rate is now 0.02"),
        (["--resume", "--temperature", 2], "with loss {}, and loss is now {'temperature': 2.0}"),
        (["--resume", "--text", other], "with text "),
    ):
        assert main(taught(here, output, *more)) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    changed = tmp_path / "text.txt"
    changed.write_text((here / "text.txt").read_text(encoding="utf-8").replace(WORDS[0], WORDS[1]), encoding="utf-8")
    run = json.loads((kept / "run.json").read_text())
    run["settings"]["text"] = str(changed)
    (kept / "run.json").write_text(json.dumps(run))
    assert main(taught(here, output, "--resume", "--text", changed)) == 2
    assert "a run with another text: it has changed" in capsys.readouterr().err
    (student / "optimizer.safetensors").write_bytes((student / "optimizer.safetensors").read_bytes()[:-100])
    run["settings"]["text"] = str(here / "text.txt")
    (kept / "run.json").write_text(json.dumps(run))
    assert main(taught(here, output, "--resume")) == 2
    assert "cannot be gone on from: optimizer.safetensors" in capsys.readouterr().err


def test_a_second_run_in_the_same_folder_is_refused(here, tmp_path, capsys):
    import fcntl

    output = tmp_path / "run"
    output.mkdir()
    with (output / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(taught(here, output)) == 2
    assert "written to by another run" in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_checkpoint(here, tmp_path, monkeypatch, capsys):
    synchronise, calls = os.fsync, []

    def full(descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith("optimizer.safetensors"):
            calls.append(name)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
        synchronise(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    output = tmp_path / "run"
    assert main(taught(here, output)) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    kept = checkpoints.checkpoints(output)
    assert [path.name for path in kept] == ["checkpoint-000004"] and not list(output.glob(".checkpoint*"))
    initial_models.load("checkpoint", kept[0])


def test_a_file_that_the_system_refuses_to_write_is_named(here, tmp_path, capsys):
    """Of 20 kB at most: safetensors raises an error of its own for what the system says."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    output = tmp_path / "run"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        status = main(taught(here, output))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err.splitlines()[-1]
    assert status == 2 and "checkpoint-000004 cannot be written to" in said and "File too large" in said
    assert sorted(path.name for path in output.iterdir()) == [".lock", "log.jsonl"]
    # There is no checkpoint to go on from, and so the run begins anew.
    assert main(taught(here, output, "--resume")) == 0


def test_a_cached_teacher_teaches_like_the_living_one(here, tmp_path):
    """Rows of 40 words in pieces of 16: two whole ones and half a one, which is padded."""
    cached = tmp_path / "cached"
    command = ["cache", "--teacher", here / "teacher", "--text", here / "text.jsonl", "--text-field", "body", "--output", cached]
    assert main(list(map(str, [*command, "--dtype", "float32", "--sequence-length", 16, "--shard-mib", 0.05]))) == 0
    output = tmp_path / "run"
    assert main(flags(here, output, "--teacher-cache", cached, "--at-once", 3, "--ce-weight", 0.5)) == 0
    report = json.loads((output / "train.json").read_text(encoding="utf-8"))
    assert report["table"]["student after"]["kl"] < report["table"]["student before"]["kl"] and report["table"]["teacher"]["kl"] < 1e-5

    from distill_kernels.api.cache.reading import TeacherCache

    cache = TeacherCache.open(cached)
    text = loop.CachedText(cache, torch.arange(len(cache)))
    rows = torch.tensor([0, 2, 5, 3])  # 16, 8, 8 and 16 tokens
    inputs = text.inputs(rows)
    assert inputs["attention_mask"].sum(1).tolist() == [16, 8, 8, 16]
    teacher, _ = initial_models.load("teacher", here / "teacher")
    student, _ = initial_models.load("student", here / "student")
    ids = [cache.row(int(row))["input_ids"] for row in rows]
    losses, gradients = [], []
    for living in (False, True):
        student.zero_grad()
        if living:
            z, y = (torch.cat([model(row[None]).logits[0, :-1] for row in ids]) for model in (student, teacher))
            loss = F.kl_div(F.log_softmax(z, -1), F.log_softmax(y, -1), log_target=True, reduction="batchmean")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        else:
            optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
            optimizer.zero_grad = lambda: None
            (made,) = loop.train(student, text, rows[None], optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), at_once=3)
        losses.append(float(loss.detach()) if living else made["loss"])
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in student.parameters()]).clone())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_a_cache_of_top_k_log_probabilities_teaches(here, tmp_path, capsys):
    """All 300 of them with nothing in the tail: the loss is the full one. And what is refused."""
    cached = {}
    for kind, more in (("top-k", ["--kind", "top-k", "--top-k", 300]), ("hidden", ["--dtype", "float32"])):
        cached[kind] = tmp_path / kind
        command = ["cache", "--teacher", here / "teacher", "--text", here / "text.txt", "--output", cached[kind], "--sequence-length", 16]
        assert main(list(map(str, [*command, "--temperature", 2, *more]))) == 0
    losses = []
    for kind, more in (("top-k", ["--tail", "ignore"]), ("hidden", ["--temperature", 2])):
        output = tmp_path / f"run {kind}"
        assert main(flags(here, output, "--teacher-cache", cached[kind], "--ce-weight", 0.5, *more)) == 0
        report = json.loads((output / "train.json").read_text(encoding="utf-8"))
        assert report["table"]["student after"]["perplexity"] < report["table"]["student before"]["perplexity"]
        losses.append(report["training_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    capsys.readouterr()
    for more, words in (
        (["--teacher-cache", cached["top-k"]], "pass --tail"),
        (["--teacher-cache", cached["hidden"], "--tail", "bucket"], "leave out --tail"),
        (["--teacher", here / "teacher", "--text", here / "text.txt", "--tail", "bucket"], "--tail is of a --teacher-cache"),
        (["--teacher-cache", cached["top-k"], "--tail", "bucket", "--sweep", "int8", "--column-fraction", 0.1], "sweep"),
        (["--teacher-cache", cached["top-k"], "--tail", "bucket", "--temperature", 3], "temperature"),
    ):
        assert main(flags(here, tmp_path / "refused", *more)) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]


def test_text_alone_trains_by_cross_entropy(here, tmp_path, capsys):
    output = tmp_path / "run"
    text = ["--text", here / "text.jsonl", "--text-field", "body", "--held-out", here / "text.txt"]
    assert main(flags(here, output, *text, "--kd-weight", 0, "--ce-weight", 1, "--precision", "bfloat16", "--json")) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report == json.loads((output / "train.json").read_text(encoding="utf-8"))
    assert "perplexity" in printed.err and report["teacher"] is None and set(report["table"]) == {"student before", "student after"}
    assert report["table"]["student after"]["perplexity"] < report["table"]["student before"]["perplexity"]
    assert report["text"]["held_out_tokens"] == 30 * 40 // 16 * 16


def test_a_student_cut_from_the_teacher_keeps_its_head(here, tmp_path):
    output = tmp_path / "run"
    more = ["--student-layers", "0,2,3", "--gradient-checkpointing", "--column-fraction", 0.08, "--backend", "torch"]
    assert main([flag for flag in taught(here, output, *more) if flag not in ("--student", str(here / "student"))]) == 0
    student, _ = initial_models.load("student", output / "student")
    teacher, _ = initial_models.load("teacher", here / "teacher")
    assert student.config.num_hidden_layers == 3 and torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    assert not torch.equal(student.model.layers[1].mlp.up_proj.weight, teacher.model.layers[2].mlp.up_proj.weight)


def test_a_model_that_was_dequantised_can_be_saved(here, tmp_path):
    from transformers import GgufConfig
    from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

    model, _ = initial_models.load("student", here / "student")
    model.config.quantization_config = GgufConfig()
    model.hf_quantizer, model.is_quantized = GgufHfQuantizer(model.config.quantization_config), True
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not supported for quantized"):
        model.float()
    copy = initial_models.savable(model).float()
    copy.save_pretrained(tmp_path)
    assert all(torch.equal(a, b) and a.requires_grad == b.requires_grad for a, b in zip(model.parameters(), copy.parameters(), strict=True))


def test_json_lines_are_split_by_whole_documents(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": word * 10}) for word in "abcdefghij") + "\n\n", encoding="utf-8")
    documents = corpus.split_documents(path, seed=0)
    assert documents.train == [word * 10 for word in "abcdefgh"] and documents.held_out == ["i" * 10, "j" * 10]
    for content, words in (
        ('{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ('{"text": "a"}\n\n[1]', "line 3: wanted an object with text in 'text', got list"),
        ('{"body": "a", "title": 3}', "line 1: wanted an object with text in 'text', got the fields body, title"),
        ('{"text": "a"}', "has one line"),
        ("\n", "is empty"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"text\.jsonl") as refused:
            corpus.split_documents(path, seed=0)
        assert words in str(refused.value)


def test_bad_input_is_refused_in_one_sentence(here, tmp_path, capsys):
    save_llama(tmp_path / "wide", vocabulary=320)
    save_llama(tmp_path / "renamed", words=WORDS[::-1])
    (tmp_path / "short.txt").write_text("ban bar\n\nbas")
    (tmp_path / "file").write_text("")
    teacher, text = ["--teacher", here / "teacher"], ["--text", here / "text.txt"]
    for more, words in (
        (text, "there is no teacher"),
        ([*text, "--kd-weight", 0], "there is nothing to compute"),
        (teacher, "there is no text"),
        ([*teacher, *text, "--teacher-cache", tmp_path], "both given"),
        (["--teacher-cache", tmp_path, *text], "leave out --text"),
        (["--teacher-cache", tmp_path], "holds no teacher cache"),
        ([*teacher, *text, "--student-layers", "0,1"], "--student-layers are of the teacher"),
        ([*teacher, *text, "--teacher", tmp_path / "absent"], "absent"),
        ([*teacher, *text, "--student", tmp_path / "wide"], "student_weight has 320 rows but teacher_weight has 300"),
        ([*teacher, *text, "--student", tmp_path / "renamed"], "differ in 240 tokens"),
        ([*teacher, "--text", tmp_path / "short.txt"], "too short"),
        ([*teacher, *text, "--sequence-length", 65], "64 tokens which the teacher can read"),
        ([*teacher, *text, "--steps", 0], "--steps must be"),
        ([*teacher, *text, "--at-once", 0], "--at-once must be"),
        ([*teacher, *text, "--learning-rate", "inf"], "--learning-rate must be"),
        ([*teacher, *text, "--learning-rate", 1e30], "smaller --learning-rate"),
        ([*teacher, *text, "--temperature", 0], "temperature must be"),
        ([*teacher, *text, "--backend", "abacus"], "abacus"),
        ([*teacher, *text, "--sweep", "int8"], "column_fraction"),
        ([*teacher, *text, "--output", tmp_path / "file"], "cannot be written"),
    ):
        output = Path(tmp_path, "run", *words.split()[:1])
        assert main(flags(here, output, *more)) == 2, words
        sentence = capsys.readouterr().err.splitlines()[-1]
        assert sentence.startswith("distill-kernels: ") and words in sentence, (words, sentence)
    with pytest.raises(SystemExit):
        main(flags(here, tmp_path / "run", *teacher, *text, "--divergence", "jensen_shannon"))
    assert "has parameters" in capsys.readouterr().err
