"""The `diwa` command: help, defaults, overwriting, and errors a person can act on."""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys

import pytest

import diwa.report
from diwa import cli
from diwa.config import Config, from_dict, to_dict
from diwa.errors import StoreError
from diwa.presets import PRESETS
from diwa.run import PHASES, RunFolder


@pytest.fixture
def phases(monkeypatch):
    """Stand-ins for the phases that note that they ran."""
    ran = []

    def fake(name):
        def phase(config, run):
            with run.phase(name, 1) as current:
                if current.done:
                    return current.result
                ran.append(name)
                return current.finish({})

        return phase

    monkeypatch.setattr(cli, "phase_function", fake)
    monkeypatch.setattr(diwa.report, "print_summary", lambda run: None)
    return ran


def run_cli(capsys, *arguments):
    """Exit code, standard output and standard error, without tyro's frames and line breaks."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, re.sub(r"[\s│]+", " ", err)


def test_overview_names_every_command(capsys):
    code, out, _ = run_cli(capsys, "--help")
    assert code == 0
    assert all(re.search(rf"^  {name} ", out, re.M) for name in cli.COMMANDS)
    assert tuple(cli.FUNCTIONS) == PHASES


@pytest.mark.parametrize("command", ["run", *(name.replace("_", "-") for name in cli.FUNCTIONS)])
def test_help_of_every_command_documents_every_setting(capsys, command):
    code, out, _ = run_cli(capsys, command, "--help")
    assert code == 0
    for name in ("--preset", "--run-dir", "--overwrite", "--task", "--world-model.deter-dim"):
        assert name in out
    assert "H, size of the deterministic state h." in out


def test_module_is_the_command():
    shown = subprocess.run(
        [sys.executable, "-m", "diwa", "--help"], capture_output=True, text=True, check=True
    )
    assert "world-model" in shown.stdout


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["rnu"], "did you mean `diwa run`?"),
        (["run", "--tsak", "open_drawer"], "Perhaps you meant: ─* ?--task"),
        (["finetune", "--finetune.clip-coeff", "0.1"], "--finetune.clip-coef "),
        (["run", "--preset", "big"], "no preset 'big'; choose from tiny, small, "),
        (["run", "--seed", "-1"], "seed is -1; it must not be negative"),
        (
            ["run", "--preset", "pixels", "--world-model.steps", "100"],
            "frozen_encoder_steps is 8000; it must be less than world_model.steps \\(100\\)",
        ),
        (["run", "--seed", "x"], "--seed"),
        (["run", "--config", "nowhere.json"], "nowhere.json does not exist"),
        (["run", "--config", "a", "--preset", "tiny"], "use one of them"),
        (["run", "--finetune.ft-denoising-steps", "21"], r"must be 1 to .* \(20\)"),
    ],
)
def test_mistakes_are_explained(capsys, arguments, expected):
    code, _, err = run_cli(capsys, *arguments)
    assert code == 2
    assert re.search(expected, err), err
    assert "Traceback" not in err


def test_an_unknown_task_lists_the_eight(capsys):
    from diwa.envs.tasks import TASKS

    code, _, err = run_cli(capsys, "run", "--task", "open_window")
    assert code == 2
    assert all(task in err for task in TASKS)


def test_defaults_preset_config_and_flags(tmp_path):
    assert cli.parse("run", []).settings == PRESETS["small"]
    tiny = cli.parse("run", ["--preset", "tiny", "--seed", "3", "--world-model.steps", "7"])
    assert tiny.settings == dataclasses.replace(
        PRESETS["tiny"],
        seed=3,
        world_model=dataclasses.replace(PRESETS["tiny"].world_model, steps=7),
    )
    (tmp_path / "config.json").write_text(json.dumps(to_dict(tiny.settings)))
    for flag in ("--config", "--run-dir"):
        again = cli.parse("run", [flag, str(tmp_path), "--seed", "4"]).settings
        assert again == dataclasses.replace(tiny.settings, seed=4)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"tassk": 1}, "tassk"),
        ({"seed": "0"}, "seed is '0'; it must be of type <class 'int'>"),
        ({"task": "fly"}, "task is 'fly'; choose from open_drawer"),
        ({"policy": 3}, "is no configuration"),
    ],
)
def test_a_bad_config_file_names_the_setting(tmp_path, capsys, change, expected):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**to_dict(PRESETS["tiny"]), **change}))
    code, _, err = run_cli(capsys, "run", "--config", str(path))
    assert code == 2
    assert expected in err and "c.json" in err


def test_run_goes_through_the_phases_and_resumes(tmp_path, capsys, phases):
    arguments = ["run", "--preset", "tiny", "--run-dir", str(tmp_path / "r")]
    assert run_cli(capsys, *arguments)[0] == 0
    assert phases == list(PHASES)
    assert run_cli(capsys, *arguments)[0] == 0
    assert phases == list(PHASES)
    saved = json.loads((tmp_path / "r/config.json").read_text())
    assert from_dict(Config, saved) == PRESETS["tiny"]


def test_default_folder_names_preset_task_and_seed(tmp_path, capsys, phases, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_cli(capsys, "collect", "--preset", "tiny", "--seed", "5", "--task", "open_drawer")
    assert (tmp_path / "runs/tiny-open_drawer-s5/collect/result.json").exists()


def test_overwrite_redoes_a_phase_and_the_later_ones(tmp_path, capsys, phases):
    run_dir = ["--run-dir", str(tmp_path / "r")]
    run_cli(capsys, "run", "--preset", "tiny", *run_dir)
    phases.clear()
    change = ["--finetune.iterations", "9"]
    code, _, err = run_cli(capsys, "finetune", *run_dir, *change)
    assert code == 2 and "finetune.iterations: 3 there, 9 now" in err
    assert run_cli(capsys, "finetune", *run_dir, *change, "--overwrite")[0] == 0
    assert phases == ["finetune"]
    assert not (tmp_path / "r/evaluate").exists()
    assert (tmp_path / "r/reward").exists()
    assert json.loads((tmp_path / "r/config.json").read_text())["finetune"]["iterations"] == 9

    code, _, err = run_cli(capsys, "finetune", *run_dir, "--world-model.steps", "1", "--overwrite")
    assert code == 2 and "world_model.steps is 150" in err
    assert (tmp_path / "r/finetune").exists()
    assert run_cli(capsys, "run", *run_dir, "--world-model.steps", "1", "--overwrite")[0] == 0
    assert phases == ["finetune", *PHASES]


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys, phases):
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = run_cli(capsys, "run", "--preset", "tiny", "--run-dir", str(tmp_path))
    assert code == 2 and "neither empty nor a run folder" in err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "error, expected",
    [
        (StoreError("play/ep_1 is truncated"), "diwa: play/ep_1 is truncated"),
        (ModuleNotFoundError("x", name="pybullet"), 'pip install "diwa[sim]"'),
        (ModuleNotFoundError("x", name="matplotlib.pyplot"), 'pip install "diwa[report]"'),
        (OSError(errno.ENOSPC, "No space left on device", "model"), "the disk is full (model)"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "Permission denied"),
    ],
)
def test_errors_of_phases_are_short(tmp_path, capsys, monkeypatch, error, expected):
    def fail(config, run):
        raise error

    monkeypatch.setattr(cli, "phase_function", lambda name: fail)
    monkeypatch.delenv("DIWA_DEBUG", raising=False)
    arguments = ["reward", "--preset", "tiny", "--run-dir", str(tmp_path / "r")]
    code, out, err = run_cli(capsys, *arguments)
    assert code == 2 and expected in err and "Traceback" not in err and not out
    monkeypatch.setenv("DIWA_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(arguments)


def test_interruption_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def stop(config, run):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "phase_function", lambda name: stop)
    code, _, err = run_cli(capsys, "run", "--preset", "tiny", "--run-dir", str(tmp_path / "r"))
    assert code == 130 and "run the same command again to resume" in err


def test_termination_unwinds(tmp_path, monkeypatch):
    unwound = []

    def wait(config, run):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            unwound.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "phase_function", lambda name: wait)
    try:
        with pytest.raises(SystemExit, match="143"):
            cli.main(["run", "--preset", "tiny", "--run-dir", str(tmp_path / "r")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert unwound


def test_cuda_without_a_gpu(tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run_cli(capsys, "run", "--preset", "paper", "--run-dir", str(tmp_path / "r"))
    assert code == 2 and "--device cpu" in err
    assert not (tmp_path / "r").exists()


def test_info_is_complete(capsys):
    code, out, _ = run_cli(capsys, "info")
    assert code == 0
    for word in ("diwa", "torch", "python", "compiled libraries", "gru_cell", "reference"):
        assert word in out
    assert "For a bug report" in out


def test_every_extra_named_in_a_hint_exists():
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        extras = metadata("diwa").get_all("Provides-Extra")
    except PackageNotFoundError:
        pytest.skip("diwa is not installed")
    assert set(cli.EXTRAS.values()) <= set(extras)


def test_run_folder_of_the_command_is_one_of_the_library(tmp_path, capsys, phases):
    run_cli(capsys, "reward", "--preset", "tiny", "--run-dir", str(tmp_path / "r"))
    assert RunFolder(tmp_path / "r", PRESETS["tiny"], quiet=True).result("reward")
