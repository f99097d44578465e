"""Run folders: settings are checked, phases resume exactly, metrics never double."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from diwa.config import to_dict
from diwa.errors import RunError
from diwa.presets import PRESETS
from diwa.run import RunFolder, discard

TINY = PRESETS["tiny"]


def open_run(path, **changes) -> RunFolder:
    return RunFolder(path, dataclasses.replace(TINY, **changes), quiet=True)


def work(run: RunFolder, *, steps: int = 10, stop: int | None = None, every: int = 4) -> dict:
    """A small training phase; `stop` interrupts it before that step."""
    with run.phase("pretrain", steps, "pretrain/loss") as phase:
        if phase.done:
            return phase.result
        model = nn.Linear(3, 2)
        nn.init.ones_(model.weight)
        nn.init.zeros_(model.bias)
        modules = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}
        torch_rng = torch.Generator().manual_seed(0)
        numpy_rng = np.random.default_rng(0)
        generators = {"torch": torch_rng, "numpy": numpy_rng}
        best = phase.restore(modules, generators).get("best", float("inf"))
        for step in range(phase.start, steps):
            if step == stop:
                raise KeyboardInterrupt
            x = torch.randn(4, 3, generator=torch_rng) * float(numpy_rng.uniform())
            loss = model(x).square().mean()
            modules["optimizer"].zero_grad()
            loss.backward()
            modules["optimizer"].step()
            best = min(best, loss.item())
            phase.log(step, {"pretrain/loss": loss.item()})
            if (step + 1) % every == 0:
                phase.checkpoint(step + 1, modules, generators, {"best": best})
        return phase.finish({"best": best, "weight": model.weight.tolist()})


def curve(run: RunFolder) -> list[tuple[int, float]]:
    return [(row["step"], row["pretrain/loss"]) for row in run.metrics("pretrain")]


@pytest.mark.parametrize("stops", [[2], [4], [7], [5, 9], [1, 6, 6]])
def test_an_interrupted_phase_ends_like_an_uninterrupted_one(tmp_path, stops):
    straight = open_run(tmp_path / "straight")
    expected = work(straight)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            work(open_run(tmp_path / "resumed"), stop=stop)
    resumed = open_run(tmp_path / "resumed")
    result = work(resumed)
    assert result["weight"] == expected["weight"]
    assert result["best"] == expected["best"]
    assert curve(resumed) == curve(straight)
    assert [step for step, _ in curve(resumed)] == list(range(10))
    assert sorted(p.name for p in (tmp_path / "resumed/pretrain").iterdir()) == ["result.json"]


def test_a_finished_phase_is_not_done_again(tmp_path):
    first = work(open_run(tmp_path))
    run = open_run(tmp_path)
    assert work(run, stop=0) == first
    assert run.result("pretrain") == first
    assert first["seconds"] > 0


def test_seconds_add_up_over_sessions(tmp_path, monkeypatch):
    from diwa import run as module

    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    modules = {"m": nn.Linear(1, 1)}
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path).phase("reward", 2) as phase:
        now[0] = 7.0
        phase.checkpoint(1, modules, {})
        raise KeyboardInterrupt
    now[0] = 100.0
    with open_run(tmp_path).phase("reward", 2) as phase:
        phase.restore(modules, {})
        now[0] = 105.0
        assert phase.finish({})["seconds"] == 12.0


def test_metrics_of_other_phases_and_cut_lines(tmp_path):
    run = open_run(tmp_path)
    with run.phase("collect", 2) as phase:
        phase.log(0, {"collect/x": 1.0})
        phase.log(1, {"collect/x": 2.0})
        phase.finish({})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"phase": "reward", "st')
    assert len(run.metrics()) == 2
    work(run)
    assert len(run.metrics("collect")) == 2
    assert len(run.metrics("pretrain")) == 10
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert {"phase", "step", "time"} <= set(json.loads(line))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_names_itself(tmp_path, value):
    run = open_run(tmp_path)
    with pytest.raises(RunError, match="reward/loss is .* at step 3"), run.phase("reward", 9) as ph:
        ph.log(3, {"reward/loss": value})
    assert not run.metrics()


def test_other_settings_are_refused_with_both_values(tmp_path):
    open_run(tmp_path)
    with pytest.raises(RunError) as caught:
        open_run(tmp_path, seed=3, policy=dataclasses.replace(TINY.policy, width=32))
    message = str(caught.value)
    assert "seed: 0 there, 3 now" in message
    assert "policy.width: 64 there, 32 now" in message
    assert "--overwrite" in message and "--run-dir" in message
    assert json.loads((tmp_path / "config.json").read_text()) == to_dict(TINY)


def test_folder_names_versions(tmp_path):
    open_run(tmp_path)
    saved = json.loads((tmp_path / "versions.json").read_text())
    assert saved["torch"] == torch.__version__
    assert set(saved) == {"diwa", "commit", "torch", "numpy", "python", "platform", "device"}
    saved["torch"] = "1.0"
    (tmp_path / "versions.json").write_text(json.dumps(saved))
    for _ in range(2):
        with open_run(tmp_path).phase("reward", 1):
            pass
    again = json.loads((tmp_path / "versions.json").read_text())
    assert again["torch"] == "1.0"
    assert [v["torch"] for v in again["later"]] == [torch.__version__]


def test_a_missing_result_names_the_command(tmp_path):
    run = open_run(tmp_path)
    with pytest.raises(RunError, match="'world_model'.*diwa world-model --run-dir"):
        run.result("world_model")


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(RunError, match="is a file"):
        open_run(tmp_path / "x")


def test_two_processes_on_one_phase(tmp_path):
    with open_run(tmp_path).phase("reward", 1):
        with (
            pytest.raises(RunError, match="another process"),
            open_run(tmp_path).phase("reward", 1),
        ):
            pass
        with open_run(tmp_path).phase("pretrain", 1):
            pass
    assert not (tmp_path / "reward").exists()


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/.model.safetensors.123.tmp").write_bytes(b"half")
    work(open_run(tmp_path))
    assert not list((tmp_path / "pretrain").glob(".*"))


def test_discard(tmp_path):
    run = open_run(tmp_path)
    with run.phase("collect", 1) as phase:
        phase.log(0, {"x": 1.0})
        phase.finish({})
    work(run)
    discard(tmp_path, ["pretrain", "reward"])
    assert not (tmp_path / "pretrain").exists()
    assert [row["phase"] for row in run.metrics()] == ["collect"]
    assert run.result("collect")


def test_plain_progress(tmp_path, capsys, monkeypatch):
    from diwa import progress

    monkeypatch.setattr(progress, "PLAIN_LEAST", 0.0)
    run = RunFolder(tmp_path, TINY)
    work(run)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("pretrain  5/10  pretrain/loss") for line in lines)
    assert re.search(r"pretrain  done in \d+:\d\d", lines[-1])
    work(run)
    assert capsys.readouterr().err == "pretrain  done before, in 0:00\n"


def test_tensorboard_curves(tmp_path):
    pytest.importorskip("tensorboard")
    work(open_run(tmp_path))
    assert list((tmp_path / "tensorboard/pretrain").glob("events.*"))


def test_a_setting_that_is_newer_than_the_run_is_no_difference(tmp_path):
    open_run(tmp_path / "run").close()
    file = tmp_path / "run" / "config.json"
    values = json.loads(file.read_text())
    del values["online"], values["world_model"]["init_from"]
    file.write_text(json.dumps(values))
    open_run(tmp_path / "run").close()
    changed = dataclasses.replace(TINY.world_model, init_from="elsewhere")
    with pytest.raises(RunError, match="world_model.init_from: None there, elsewhere now"):
        open_run(tmp_path / "run", world_model=changed)
