"""The whole path through the command line, and the same path killed again and again.

The sizes are below those of the `tiny` preset, which CI runs through README's commands.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from diwa import checkpoint
from diwa.run import PHASES, discard

pytest.importorskip("pybullet", reason="the pipeline needs the simulator")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = shlex.split("""
--preset tiny --threads 1 --task move_slider_right
--collect.play-transitions 3000 --collect.demos 2 --collect.train-starts 32
--world-model.deter-dim 16 --world-model.stoch-groups 4 --world-model.stoch-classes 4
--world-model.hidden-dim 16 --world-model.embed-dim 16 --world-model.mlp-dim 16
--world-model.steps 300 --world-model.batch-size 4 --world-model.seq-len 8
--world-model.holdout 0.2
--policy.width 16 --pretrain.steps 60 --pretrain.batch-size 16
--reward.steps 60 --reward.width 16 --reward.batch-size 16
--finetune.iterations 8 --finetune.n-dreams 4 --finetune.n-chunks 3 --finetune.max-episode-steps 60
--finetune.update-epochs 1 --finetune.bc-states 4 --finetune.imagined-eval 4
--finetune.eval-every 4 --finetune.eval-episodes 2
--evaluate.episodes 2 --evaluate.max-episode-steps 8 --evaluate.videos 1
""")

# Runs the command and dies without warning right after a given row of metrics was logged.
KILLED = """
import os, signal, sys
from diwa import cli, run

name, at = sys.argv[1], int(sys.argv[2])
log = run.Phase.log

def log_and_die(phase, step, metrics):
    log(phase, step, metrics)
    if phase.name == name and step >= at:
        os.kill(os.getpid(), signal.SIGKILL)

run.Phase.log = log_and_die
sys.exit(cli.main(sys.argv[3:]))
"""


def command(folder, *arguments):
    return ["run", *SETTINGS, "--run-dir", str(folder), *arguments]


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and output of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("pipeline") / "straight"
    done = start("-m", "diwa", *command(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def rows(folder):
    """Metrics without those that a clock gives."""
    clock = ("time", "world_model/data_wait")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def test_run_ends_with_the_table(finished):
    folder, out = finished
    assert "| before: cloned from demonstrations |" in out
    assert "| after: PPO in imagination |" in out
    assert "simulator steps in fine-tuning: 0" in out
    for phase in PHASES[:-1]:
        result = json.loads((folder / phase / "result.json").read_text())
        assert result["seconds"] > 0, phase
        assert not (folder / phase / "training_state").exists()


def test_run_leaves_a_report(finished):
    folder, _ = finished
    numbers = json.loads((folder / "report/report.json").read_text())
    assert numbers["success"].keys() == {"base", "finetuned"}
    assert numbers["success"]["base"]["n"] == 2
    assert numbers["finetune_env_steps"] == 0
    assert not numbers["skipped"]
    assert "before_after.mp4" in numbers["files"] and "dream.png" in numbers["files"]
    names = {name for row in rows(folder) for name in row}
    assert {"finetune/imagined_success", "finetune/real_success", "world_model/loss"} <= names


def test_every_file_is_whole(finished):
    folder, _ = finished
    assert not [p for p in folder.rglob("*") if p.name.endswith(".tmp") or p.name == ".lock"]
    for path in folder.rglob("*.safetensors"):
        assert checkpoint.read_tensors(path), path


def test_the_same_command_again_changes_nothing(finished):
    folder, out = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    done = start("-m", "diwa", *command(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout == out
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert after == before


def test_a_run_killed_in_every_long_phase_ends_the_same(finished, tmp_path):
    """World model and fine-tuning are killed after rows that their checkpoints do not cover."""
    straight, _ = finished
    folder = tmp_path / "killed"
    shutil.copytree(straight, folder)
    discard(folder, PHASES[1:])
    for phase, step in (("world_model", 25), ("world_model", 275), ("reward", 0), ("finetune", 6)):
        done = start("-c", KILLED, phase, str(step), *command(folder))
        assert done.returncode == -signal.SIGKILL, (phase, step, done.stderr)
        assert not (folder / phase / "result.json").exists()
    assert (folder / "finetune/training_state/state.json").exists()
    done = start("-m", "diwa", *command(folder))
    assert done.returncode == 0, done.stderr
    assert "finetune  resumes at step 5/8" in done.stderr
    for path in straight.rglob("*.safetensors"):
        again = folder / path.relative_to(straight)
        assert again.read_bytes() == path.read_bytes(), path.parent.name
    for name in ("finetune", "evaluate"):
        results = [json.loads((f / name / "result.json").read_text()) for f in (straight, folder)]
        for result in results:
            del result["seconds"]
        assert results[0] == results[1]
    assert rows(folder) == rows(straight)
