"""The online baseline: the simulator behind a dream's interface, its counted steps, the table."""

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("gymnasium", reason="the baseline acts in the simulator")
pytest.importorskip("pybullet", reason="the baseline acts in the simulator")

from diwa.agent import save_policy, save_world_model
from diwa.cli import main
from diwa.compare import steps_to_match
from diwa.config import OnlineConfig, WorldModelConfig
from diwa.data.store import NEUTRAL_ACTION
from diwa.envs import SimulatorSpec
from diwa.envs.online import OnlineEnv
from diwa.envs.queue import StartQueue
from diwa.nn.diffusion import DiffusionPolicy
from diwa.nn.world_model import WorldModel
from diwa.phases.collect import save_starts
from diwa.phases.evaluate import task_starts
from diwa.phases.online import finetune_online
from diwa.presets import PRESETS
from diwa.run import RunFolder

TASK = "turn_on_led"
SIZES = WorldModelConfig(
    deter_dim=8, stoch_groups=2, stoch_classes=4, hidden_dim=8, embed_dim=8, mlp_dim=8
)


@pytest.fixture(scope="module")
def model() -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(SIZES).requires_grad_(False)


def test_episodes_are_filtered_counted_and_restarted(model):
    starts = task_starts(TASK, 4, 5)
    env = OnlineEnv(model, TASK, starts, n=2, max_episode_steps=6, seed=0)
    everyone = torch.ones(2, dtype=torch.bool)
    rng = torch.Generator().manual_seed(0)
    try:
        env.reset(everyone, torch.rand(2), torch.rand(2, 2, generator=rng))
        begin = env.state.h.clone()
        assert not torch.equal(begin[0], torch.zeros(8)) and env.steps == 0
        action = torch.zeros(2, 4, 7)
        action[..., 6] = 1
        feature, won, cut = env.step(action, torch.rand(4, 2, 2, generator=rng))
        assert env.steps == 8 and feature.shape == (2, model.feature_dim)
        assert not won.any() and not cut.any()
        _, won, cut = env.step(action, torch.rand(4, 2, 2, generator=rng))
        assert env.steps == 12, "both episodes are cut after 6 steps and idle for two"
        assert cut.all() and not won.any()
        still = env.state.h.clone()
        env.reset(torch.tensor([True, False]), torch.rand(2), torch.rand(2, 2, generator=rng))
        assert not torch.equal(env.state.h[0], still[0]) and torch.equal(env.state.h[1], still[1])
    finally:
        env.close()


def test_the_baseline_sees_the_pictures_of_its_world_model():
    """The state after a reset is the posterior of the pictures that the simulator renders."""
    torch.manual_seed(0)
    sizes = dataclasses.replace(SIZES, observation="hybrid", cnn_depth=2, stoch_groups=32)
    model = WorldModel(sizes).requires_grad_(False)
    starts = task_starts(TASK, 2, 5)
    env = OnlineEnv(model, TASK, starts, n=1, max_episode_steps=8, seed=0)
    uniform = torch.rand(1, 32, generator=torch.Generator().manual_seed(0))
    try:
        env.reset(torch.ones(1, dtype=torch.bool), torch.rand(1), uniform)
    finally:
        env.close()
    first = np.random.default_rng(0).integers(2, size=10_000)[0]
    simulator = SimulatorSpec(image_size=64).make(task=TASK)
    try:
        seen, _ = simulator.reset(options={k: v[first] for k, v in starts.items()})
    finally:
        simulator.close()
    frames = {k: torch.from_numpy(seen[k][None]) for k in model.inputs}
    neutral = torch.tensor(NEUTRAL_ACTION)[None]
    zero = model.rssm.initial(1)
    expected = model.filter(zero, model.observation(**frames), neutral, torch.ones(1), uniform)
    torch.testing.assert_close(env.state.h, expected.h)
    torch.testing.assert_close(env.state.z, expected.z)
    dark = {**frames, "rgb_static": torch.zeros_like(frames["rgb_static"])}
    blind = model.filter(zero, model.observation(**dark), neutral, torch.ones(1), uniform)
    assert not torch.equal(blind.z, expected.z), "the pictures are seen in z"


def test_the_baseline_stops_at_its_limit_and_reports(model, tmp_path, capsys):
    tiny = PRESETS["tiny"]
    config = dataclasses.replace(
        tiny,
        task=TASK,
        threads=1,
        policy=dataclasses.replace(tiny.policy, width=16),
        world_model=SIZES,
        finetune=dataclasses.replace(
            tiny.finetune, max_episode_steps=8, bc_states=4, update_epochs=1, minibatches=1
        ),
        online=OnlineConfig(
            envs=2, n_chunks=2, max_env_steps=20, target_success=1.0, eval_every=1, eval_episodes=2
        ),
        evaluate=dataclasses.replace(tiny.evaluate, workers=1, max_episode_steps=8),
    )
    run = RunFolder(tmp_path / "run", config, quiet=True)
    save_world_model(run.dir("world_model"), model)
    base = DiffusionPolicy(model.feature_dim, config.policy)
    save_policy(run.dir("pretrain"), base)
    run.dir("collect").mkdir()
    save_starts(run.dir("collect") / "starts.npz", task_starts(TASK, 4, 5))
    result = finetune_online(config, run)
    assert 20 <= result["env_steps"] <= 36 and not result["reached"]
    counted = [e["env_steps"] for e in result["evaluations"]]
    assert counted[-1] == result["env_steps"] and counted == sorted(set(counted))
    at_once = dataclasses.replace(config.online, max_env_steps=0, eval_every=0)
    run.dir("online").joinpath("result.json").unlink()
    result = finetune_online(dataclasses.replace(config, online=at_once), run)
    assert len(result["evaluations"]) == 1, "whatever the limit, there is a result"
    run.close()

    assert main(["compare", str(run.path)]) == 2
    assert "diwa evaluate --run-dir" in capsys.readouterr().err
    outcome = {"success": 0.0, "n": 2, "ci": [0.0, 0.66]}
    for phase, text in (
        ("evaluate", {"base": outcome, "finetuned": outcome}),
        ("finetune", {"finetune_env_steps": 0}),
    ):
        run.dir(phase).mkdir(exist_ok=True)
        (run.dir(phase) / "result.json").write_text(json.dumps(text))
    assert main(["compare", str(run.path)]) == 0
    assert TASK in capsys.readouterr().out


def test_steps_to_match():
    curve = {"evaluations": [{"env_steps": n, "success": s} for n, s in ((10, 0.4), (20, 0.7))]}
    assert steps_to_match(curve, 0.5) == 20
    assert steps_to_match(curve, 0.4) == 10
    assert steps_to_match(curve, np.nextafter(0.7, 1)) is None


def test_overwrite_makes_the_baseline_anew_in_the_default_folder_too(tmp_path, monkeypatch):
    ran = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diwa.phases.online.finetune_online", baseline(ran))
    for arguments, times in (([], 1), ([], 1), (["--overwrite"], 2)):
        assert main(["finetune", "--online", "--preset", "tiny", *arguments]) == 0
        assert len(ran) == times


def baseline(ran: list) -> Callable:
    """A baseline that only notes that it ran."""

    def run_it(config, run):
        with run.phase("online", 1) as phase:
            if phase.result is None:
                ran.append(config.task)
                phase.finish({"env_steps": 1, "evaluations": [{"success": 0.5}]})
            return phase.result

    return run_it


def test_online_belongs_to_finetune(capsys):
    assert main(["pretrain", "--online"]) == 2
    assert "diwa finetune" in capsys.readouterr().err


def test_start_queue_hands_out_its_starts_in_order():
    import gymnasium

    class Recorder(gymnasium.Env):
        def reset(self, *, seed=None, options=None):
            return options, {}

    starts = {"robot_obs": np.arange(4)[:, None], "scene_obs": 10 * np.arange(4)[:, None]}
    env = StartQueue(Recorder(), starts, [2, 0])
    seen = [env.reset(options={"extra": 1}) for _ in range(3)]
    assert [info["start_index"] for _, info in seen] == [2, 0, 0]
    assert [obs["scene_obs"].item() for obs, _ in seen] == [20, 0, 0]
    assert seen[0][0]["extra"] == 1
