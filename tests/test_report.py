"""The report: its numbers are those of the phases, missing parts and packages are left out."""

import builtins
import dataclasses
import html.parser
import json
import os

import numpy as np
import pytest

from diwa import report
from diwa.errors import RunError
from diwa.presets import PRESETS
from diwa.run import RunFolder
from diwa.stats import success_rate


def finish(run, name, result, rows=()):
    with run.phase(name, 10) as phase:
        for step, metrics in enumerate(rows):
            phase.log(step, metrics)
        phase.finish(result)


@pytest.fixture
def run(tmp_path):
    """A run folder as the phases leave it, without the models."""
    config = PRESETS["tiny"]
    config = dataclasses.replace(
        config, evaluate=dataclasses.replace(config.evaluate, videos=0, episodes=20)
    )
    run = RunFolder(tmp_path / "run", config, quiet=True)
    finish(run, "collect", {"play_transitions": 4000, "demos": 4})
    errors = {"model": [0.01, 0.02], "constant": [0.02, 0.08]}
    open_loop = {name: {"unit": "m", **errors} for name in ("tcp_position", "drawer", "slider")}
    finish(
        run,
        "world_model",
        {"open_loop": open_loop},
        [{"world_model/loss": 3.0 - i} for i in (1, 2)],
    )
    names = ["tcp_x", "tcp_y", "tcp_z", "gripper_width", "slider"]
    real = np.random.default_rng(0).normal(size=(5, 40, 5)).cumsum(1)
    np.savez(run.dir("world_model") / "dream.npz", real=real, dream=real + 0.1, names=names)
    finish(run, "pretrain", {}, [{"policy/bc_loss": 0.5}, {"policy/bc_loss": 0.4}])
    scores = {"precision": 0.9, "recall": 0.8, "episode_recall": 1.0, "episode_false_positive": 0.1}
    finish(run, "reward", {"windows": 9, "classifier": {"real": scores, "imagined": scores}})
    rows = [
        {"ppo/approx_kl": 0.1, "finetune/imagined_success": 0.4},
        {"ppo/approx_kl": 0.2, "finetune/imagined_success": 0.6, "finetune/real_success": 0.5},
        {"ppo/approx_kl": 0.2, "finetune/imagined_success": 0.8},
    ]
    tuned = {"imagined_start": 0.45, "imagined_final": 0.85, "finetune_env_steps": 0}
    finish(run, "finetune", tuned, rows)
    finish(run, "evaluate", {"base": success_rate(8, 20), "finetuned": success_rate(15, 20)})
    return run


@pytest.fixture
def no_video(run):
    """Films need the models, which this run folder has not."""
    (run.dir("world_model") / "dream.npz").unlink()
    return run


def test_numbers_come_from_the_phases(run):
    numbers = report.collect_numbers(run)
    assert numbers["success"]["base"] == success_rate(8, 20)
    assert numbers["success"]["finetuned"] == success_rate(15, 20)
    assert numbers["open_loop"]["drawer"] == {"unit": "m", "model": 0.02, "constant": 0.08}
    assert (numbers["imagined_start"], numbers["imagined_final"]) == (0.45, 0.85)
    assert set(numbers["seconds"]) == set(report.PHASES) - {"report"}
    assert numbers["reward"]["classifier"]["real"]["recall"] == 0.8


def test_table(run, capsys):
    table = report.markdown_table(report.collect_numbers(run))
    assert "| before: cloned from demonstrations | 40 % | 22 to 61 % | 20 |" in table
    assert "| after: PPO in imagination | 75 % | 53 to 89 % | 20 |" in table
    assert "gain: +35 points" in table
    assert "success in dreams: 45 % before, 85 % after" in table
    assert "simulator steps in fine-tuning: 0" in table
    report.print_summary(run)
    assert capsys.readouterr().out.strip() == table


def test_table_on_a_terminal(run, capsys, monkeypatch):
    monkeypatch.setattr(report.sys.stdout, "isatty", lambda: True)
    report.print_summary(run)
    out = capsys.readouterr().out
    assert "40 %" in out and "75 %" in out and "| before" not in out


def test_files_of_the_report(no_video):
    pytest.importorskip("matplotlib")
    numbers = report.make_report(no_video)
    folder = no_video.dir("report")
    assert json.loads((folder / "report.json").read_text()) == numbers
    assert numbers["files"] == [
        "success.png",
        "finetune.png",
        "open_loop.png",
        "ppo.png",
        "training.png",
    ]
    for name in numbers["files"]:
        assert (folder / name).read_bytes().startswith(b"\x89PNG"), name
    assert "75 %" in (folder / "report.md").read_text()
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_dream_beside_reality_is_drawn(run, tmp_path):
    plots = pytest.importorskip("diwa.plots", reason="needs matplotlib")
    plots.draw_all(run, tmp_path)
    assert (tmp_path / "dream.png").stat().st_size > 10_000


def test_every_link_of_the_page_leads_somewhere(no_video):
    links = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            links.extend(v for k, v in attributes if k in ("src", "href"))

    report.make_report(no_video)
    folder = no_video.dir("report")
    Reader().feed((folder / "index.html").read_text())
    assert "report.json" in links
    for link in links:
        assert (folder / link).exists(), link


def test_a_missing_package_costs_one_line(no_video, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *arguments, **keywords)

    for name in ("diwa.plots", "diwa.video"):
        monkeypatch.delitem(report.sys.modules, name, raising=False)
    monkeypatch.delattr("diwa.plots", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    no_video.quiet = False
    numbers = report.make_report(no_video)
    assert "success.png" not in numbers["files"]
    line = 'plots left out, matplotlib is missing: pip install "diwa[all]"'
    assert line in numbers["skipped"]
    assert line in capsys.readouterr().err
    assert line.replace('"', "&quot;") in (no_video.dir("report") / "index.html").read_text()


def test_a_run_that_is_not_done_is_reported_as_far_as_it_is(tmp_path):
    run = RunFolder(tmp_path / "r", PRESETS["tiny"], quiet=True)
    with pytest.raises(RunError, match="nothing to report.*diwa run"):
        report.make_report(run)
    assert not run.dir("report").exists()
    finish(run, "collect", {"play_transitions": 4000, "demos": 4})
    numbers = report.make_report(run)
    assert numbers["success"] == {} and numbers["phases_done"] == ["collect"]
    assert "play transitions: 4,000" in (run.dir("report") / "report.md").read_text()


def test_the_last_phase_makes_the_report_only_when_it_is_old(no_video, monkeypatch):
    report.report(no_video.config, no_video)
    made = []
    monkeypatch.setattr(report, "make_report", lambda run: made.append(run))
    report.report(no_video.config, no_video)
    assert not made
    later = (no_video.dir("report") / "report.json").stat().st_mtime + 1
    os.utime(no_video.dir("evaluate") / "result.json", (later, later))
    report.report(no_video.config, no_video)
    assert made == [no_video]


def test_most_moving_windows_and_starts_that_changed():
    plots = pytest.importorskip("diwa.plots", reason="needs matplotlib")
    video = pytest.importorskip("diwa.video", reason="needs imageio and the simulator")
    values = np.array([[0, 1, 0], [0, 5, 1], [2, 2, 2], [0, 3, 0]])
    assert plots.most_moving(values, 2) == [1, 3]
    base, tuned = [True, False, False, False], [True, False, True, True]
    assert video.choose_starts(base, tuned, 3) == [2, 3, 0]
    assert video.choose_starts(base, tuned, 9) == [2, 3, 0, 1]


def test_films(tmp_path):
    video = pytest.importorskip("diwa.video", reason="needs imageio and the simulator")
    playtable = pytest.importorskip("diwa.envs.playtable", reason="needs the simulator")
    from diwa.envs.starts import make_starts

    env = playtable.PlayTable(task="open_drawer", max_episode_steps=3)
    starts = make_starts("open_drawer", 1, seed=0)
    start = (starts["robot_obs"][0], starts["scene_obs"][0])
    seen = []

    def act(robot_obs, scene_obs):
        seen.append((tuple(robot_obs.shape), tuple(scene_obs.shape)))
        return np.zeros((1, 7), np.float32)

    episode = video.film_episode(env, act, *start)
    assert seen == [((1, 15), (1, 24))] * 3
    states = video.film_states(env, starts["robot_obs"], starts["scene_obs"])
    env.close()
    assert len(episode) == 4 and len(states) == 1
    both = video.side_by_side(episode, states)
    assert len(both) == 4 + video.HOLD
    assert both[0].shape == (video.SIZE, 2 * video.SIZE, 3)
    video.write_video(tmp_path / "a.mp4", both)
    read = video.imageio.mimread(tmp_path / "a.mp4", memtest=False)
    assert len(read) == len(both)
    # H.264 loses detail, but left and right must not be swapped or shifted.
    assert np.abs(read[0].astype(int) - both[0]).mean() < 8
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
