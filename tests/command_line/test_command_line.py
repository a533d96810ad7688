import json
import subprocess
import sys

import pytest
import torch

import distill_kernels
from distill_kernels.api import command_line
from distill_kernels.api.command_line import main

PLAN = ["plan", "--tokens", "8192", "--vocabulary", "128256", "--student-dim", "2048", "--teacher-dim", "4096"]


def test_plan_prints_the_plan(capsys):
    assert main([*PLAN, "--dtype", "bfloat16", "--workspace-mib", "256"]) == 0
    expected = distill_kernels.plan(8192, 128256, 2048, 4096, dtype=torch.bfloat16, workspace_mib=256)
    assert capsys.readouterr().out == f"{expected}\n"


def test_plan_takes_every_flag(capsys):
    assert main([*PLAN, "--device", "cpu", "--divergence", "reverse_kl", "--frozen-head", "--json"]) == 0
    expected = distill_kernels.plan(8192, 128256, 2048, 4096, divergence="reverse_kl", weight_gradient=False)
    printed = json.loads(capsys.readouterr().out)
    assert printed["gradient_bytes"] == expected.gradient_bytes and printed["peak_bytes"] == expected.peak_bytes
    assert printed["gradient_bytes"] < distill_kernels.plan(8192, 128256, 2048, 4096).gradient_bytes


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--tokens", "-1"], "tokens must be"),
        (["--workspace-mib", "0"], "workspace_mib must be"),
        (["--vocabulary", "100000000", "--workspace-mib", "1"], "cannot hold"),
    ],
)
def test_plan_refuses_in_one_sentence(arguments, words, capsys):
    assert main([*PLAN, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("distill-kernels: ") and words in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["plan"], [*PLAN, "--dtype", "int8"], [*PLAN, "--divergence", "euclidean"], [*PLAN, "--device", "abacus"]],
)
def test_unknown_commands_and_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_doctor_prints_what_runs(capsys):
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def test_doctor_json_is_json_alone(capsys):
    assert main(["doctor", "--json"]) == 0
    printed = capsys.readouterr().out
    reasons = json.loads(printed)
    assert reasons["torch"] is None and reasons == distill_kernels.doctor()


@pytest.mark.parametrize("command", ["demo", "train", "cache", "bench", "plan", "doctor"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and f"example:\n  distill-kernels {command} " in printed


def test_help_examples_parse():
    parser = command_line.parser()
    for action in parser._subparsers._group_actions[0].choices.values():
        parser.parse_args(action.epilog.split()[2:])


def test_version_is_printed_by_an_own_process():
    command = [sys.executable, "-m", "distill_kernels.api.command_line", "--version"]
    assert subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip() == distill_kernels.__version__


def test_bugs_are_not_hidden(monkeypatch):
    def broken(*_args, **_options):
        raise ZeroDivisionError

    monkeypatch.setattr(distill_kernels.api.measuring.diagnosis, "plan", broken)
    with pytest.raises(ZeroDivisionError):
        main(PLAN)
