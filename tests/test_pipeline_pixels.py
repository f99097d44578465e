"""The whole path from pixels through the command line, at a size that learns nothing."""

import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest

from diwa import cli
from diwa.errors import DiwaError
from diwa.run import PHASES

SETTINGS = shlex.split("""
--preset tiny --threads 1 --task move_slider_right
--collect.play-transitions 1500 --collect.demos 1 --collect.train-starts 6 --collect.workers 1
--world-model.deter-dim 16 --world-model.stoch-groups 4 --world-model.stoch-classes 4
--world-model.hidden-dim 16 --world-model.mlp-dim 16 --world-model.cnn-depth 2
--world-model.steps 12 --world-model.batch-size 4 --world-model.seq-len 8
--world-model.holdout 0.5 --world-model.open-loop-pictures 20
--policy.width 16 --pretrain.steps 20 --pretrain.batch-size 16
--reward.steps 10 --reward.width 16 --reward.windows 8
--finetune.iterations 2 --finetune.n-dreams 4 --finetune.n-chunks 3 --finetune.max-episode-steps 24
--finetune.update-epochs 1 --finetune.bc-states 4 --finetune.imagined-eval 4
--evaluate.episodes 2 --evaluate.workers 1 --evaluate.max-episode-steps 6 --evaluate.videos 1
""")


def diwa(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "diwa", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    pytest.importorskip("pybullet", reason="the pipeline needs the simulator")
    folder = tmp_path_factory.mktemp("pixels") / "hybrid"
    done = diwa("run", *SETTINGS, "--observation", "hybrid", "--run-dir", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hybrid_runs_from_end_to_end(hybrid):
    result = {p: json.loads((hybrid / p / "result.json").read_text()) for p in PHASES[:-1]}
    assert result["finetune"]["finetune_env_steps"] == 0
    assert result["evaluate"]["finetuned"]["n"] == 2
    cameras = result["world_model"]["open_loop_pictures"]["cameras"]
    for camera in ("rgb_static", "rgb_gripper"):
        assert len(cameras[camera]["psnr"]["model"]) == 20
        assert np.isfinite(cameras[camera]["ssim"]["copy"]).all()
    assert "slider" in result["world_model"]["open_loop"]
    numbers = json.loads((hybrid / "report" / "report.json").read_text())
    names = set(numbers["files"])
    assert {"pictures.png", "dream_pictures.mp4", "before_after.mp4", "dream.mp4"} <= names
    rows = [json.loads(line) for line in (hybrid / "metrics.jsonl").read_text().splitlines()]
    assert any("world_model/pictures" in row for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vision_uses_the_play_of_another_run_with_a_classifier(hybrid, tmp_path):
    """Pictures only: other phases, same play; a run that sees something else is told so."""
    folder, classifier = tmp_path / "vision", ("--reward.kind", "classifier")
    folder.mkdir()
    (folder / "collect").symlink_to(hybrid / "collect")
    config = json.loads((hybrid / "config.json").read_text())
    config["world_model"]["observation"], config["reward"]["kind"] = "vision", "classifier"
    (folder / "config.json").write_text(json.dumps(config))
    for command in ("world-model", "pretrain", "reward", "finetune"):
        done = diwa(command, "--run-dir", str(folder))
        assert done.returncode == 0, done.stderr
    result = json.loads((folder / "world_model/result.json").read_text())
    assert result["open_loop"] == {} and result["open_loop_pictures"]["cameras"]
    state = ("collect", *SETTINGS, "--from-run", str(hybrid), "--run-dir", str(tmp_path / "state"))
    done = diwa(*state, *classifier)
    assert done.returncode == 2 and "add --observation hybrid" in done.stderr


def test_vision_with_the_decoder_reward_is_refused():
    with pytest.raises(DiwaError, match="--reward.kind classifier"):
        cli.parse("run", ["--preset", "tiny", "--observation", "vision"])
    options = cli.parse(
        "run", ["--preset", "paper", "--observation", "vision", "--world-model.image-size", "224"]
    )
    model = options.settings.world_model
    assert (model.picture_size, model.cnn_depth) == (224, 48)
    assert cli.parse("run", ["--preset", "tiny"]).settings.world_model.picture_size == 0
