"""Phases on a synthetic play set: data alignment, exact resuming, labels, evaluation slots."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from slider_runs import CONFIG, LIMIT, TASK, play, slider_episode

from diwa.agent import Agent, env_action, load_classifier, load_policy
from diwa.checkpoint import read_tensors
from diwa.config import Config, PretrainConfig
from diwa.data.store import write_store
from diwa.errors import RunError, StoreError
from diwa.nn.diffusion import DiffusionPolicy
from diwa.nn.world_model import WorldModel
from diwa.phases import evaluate, finetune, pretrain, reward, world_model
from diwa.phases.collect import load_starts, save_starts
from diwa.run import Phase, RunFolder


def prepare(path, config: Config = CONFIG) -> RunFolder:
    run = RunFolder(path, config, quiet=True)
    rng = np.random.default_rng(1)
    write_store(path / "collect" / "play", play())
    write_store(
        path / "collect" / "demos", [slider_episode(n, rng, 0.6, TASK) for n in (12, 9, 15)]
    )
    starts = {"robot_obs": np.zeros((5, 15)), "scene_obs": np.zeros((5, 24))}
    starts["robot_obs"][:, 0] = starts["scene_obs"][:, 0] = np.linspace(0, 0.02, 5)
    save_starts(path / "collect" / "starts.npz", starts)
    return run


STEPS = {
    "world_model": (world_model.train_world_model, world_model, 20),
    "pretrain": (pretrain.pretrain, pretrain, 20),
    "reward": (reward.train_reward, reward, None),
    "finetune": (finetune.finetune, finetune, 1),
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> RunFolder:
    pytest.importorskip("gymnasium", reason="the phases import the simulator")
    pytest.importorskip("pybullet", reason="the phases import the simulator")
    run = prepare(tmp_path_factory.mktemp("phases") / "straight")
    for phase, _, _ in STEPS.values():
        phase(CONFIG, run)
    return run


def test_results(straight):
    result = straight.result("finetune")
    assert result["finetune_env_steps"] == 0
    assert result["imagined_steps"] == 3 * 6 * 5 * 4
    assert 0 <= result["imagined_start"] <= 1 and 0 <= result["imagined_final"] <= 1
    dreamed = [row["finetune/imagined_success"] for row in straight.metrics("finetune")]
    assert len(dreamed) == 3 and min(dreamed) > 0, "rewards, or the test of resuming says little"
    assert straight.result("world_model")["open_loop"]["slider"]["unit"] == "m"
    for judge in ("classifier", "decoder"):
        for kind in ("real", "imagined"):
            scores = straight.result("reward")[judge][kind]
            assert 0 <= scores["precision"] <= 1 and 0 <= scores["recall"] <= 1
    losses = [row["world_model/loss"] for row in straight.metrics("world_model")]
    assert losses[-1] < losses[0]


def test_finetuning_changes_the_policy_and_keeps_the_base(straight):
    base, base_steps = load_policy(straight.dir("pretrain"))
    tuned, ft_steps = load_policy(straight.dir("finetune"))
    assert base_steps == 0 and ft_steps == CONFIG.finetune.ft_denoising_steps
    assert any(
        not torch.equal(a, b) for a, b in zip(base.parameters(), tuned.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ["world_model", "pretrain", "finetune"])
def test_an_interrupted_phase_ends_with_the_same_weights(straight, tmp_path, monkeypatch, name):
    run = RunFolder(tmp_path / "run", CONFIG, quiet=True)
    for done in ["collect", *list(STEPS)[: list(STEPS).index(name)]]:
        shutil.copytree(straight.dir(done), run.dir(done))
    phase, module, every = STEPS[name]
    monkeypatch.setattr(module, "CHECKPOINT_EVERY", every)
    plain = Phase.checkpoint

    def stop(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Phase, "checkpoint", stop)
            phase(CONFIG, run)
        assert not (run.dir(name) / "result.json").exists()
    result = phase(CONFIG, run)
    expected = read_tensors(straight.dir(name) / "model.safetensors")
    got = read_tensors(run.dir(name) / "model.safetensors")
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(got[key], value), key
    want = straight.result(name)
    assert {k: v for k, v in result.items() if k != "seconds"} == {
        k: v for k, v in want.items() if k != "seconds"
    }
    assert phase(CONFIG, run) == result, "a finished phase is not run again"


def test_another_run_lends_its_play_and_world_model(straight, tmp_path):
    config = dataclasses.replace(CONFIG, from_run=str(straight.path), seed=7)
    run = RunFolder(tmp_path / "run", config, quiet=True)
    (run.dir("collect")).mkdir()
    shutil.copy(straight.dir("collect") / "starts.npz", run.dir("collect"))
    shutil.copytree(straight.dir("collect") / "demos", run.dir("collect") / "demos")
    assert world_model.train_world_model(config, run)["from_run"] == str(straight.path)
    for phase, _, _ in list(STEPS.values())[1:]:
        phase(config, run)
    assert run.result("finetune")["finetune_env_steps"] == 0


def test_training_goes_on_from_another_runs_world_model(straight, tmp_path):
    sizes = dataclasses.replace(CONFIG.world_model, init_from=str(straight.path), steps=2)
    run = prepare(tmp_path / "longer", dataclasses.replace(CONFIG, world_model=sizes))
    world_model.train_world_model(run.config, run)
    key = "world_model/reconstruction"
    after, before = ([row[key] for row in r.metrics("world_model")] for r in (run, straight))
    assert after[0] < 0.5 * (before[0] + before[-1]), "learned weights, not new ones"
    sizes = dataclasses.replace(sizes, hidden_dim=20)
    run = prepare(tmp_path / "other", dataclasses.replace(CONFIG, world_model=sizes))
    with pytest.raises(RunError, match="init_from .*another architecture"):
        world_model.train_world_model(run.config, run)


def test_too_little_or_damaged_play_is_refused(tmp_path):
    run = RunFolder(tmp_path / "run", CONFIG, quiet=True)
    with pytest.raises(StoreError, match="diwa collect"):
        world_model.train_world_model(CONFIG, run)
    store = write_store(run.dir("collect") / "play", play(1)[:1])
    short = slider_episode(5, np.random.default_rng(0), 0.0)
    write_store(store.path, [short])
    with pytest.raises(StoreError, match="too small"):
        world_model.train_world_model(CONFIG, run)
    write_store(store.path, play())
    column = np.load(store.path / "robot_obs.npy")
    column[100, 3] = np.nan
    np.save(store.path / "robot_obs.npy", column)
    with pytest.raises(StoreError, match="episode 2.*robot_obs"):
        world_model.train_world_model(CONFIG, run)
    assert not run.dir("world_model").exists()


def test_demonstrations_of_another_task_are_refused(straight, tmp_path):
    run = RunFolder(tmp_path / "run", CONFIG, quiet=True)
    shutil.copytree(straight.dir("world_model"), run.dir("world_model"))
    demos = [slider_episode(9, np.random.default_rng(0), 0.6, "open_drawer")]
    write_store(run.dir("collect") / "demos", demos)
    with pytest.raises(StoreError, match=r"open_drawer.*move_slider_left"):
        pretrain.pretrain(CONFIG, run)


def test_a_policy_of_another_world_model_is_refused(straight, tmp_path):
    run = RunFolder(tmp_path / "run", CONFIG, quiet=True)
    for name in ("collect", "world_model", "reward", "pretrain"):
        shutil.copytree(straight.dir(name), run.dir(name))
    wide = WorldModel(dataclasses.replace(CONFIG.world_model, deter_dim=32))
    world_model.save_world_model(run.dir("world_model"), wide)
    with pytest.raises(RunError, match=r"features of 40.*makes 48"):
        finetune.finetune(CONFIG, run)


def test_demo_features_belong_to_their_chunks():
    """Sample k of frame t comes with the actions taken after frame t."""
    torch.manual_seed(0)
    model = WorldModel(CONFIG.world_model).requires_grad_(False)
    rng = np.random.default_rng(0)
    demos = [slider_episode(n, rng, 0.5, TASK) for n in (6, 4, 9)]

    def generator():
        return torch.Generator().manual_seed(0)

    features, chunks = pretrain.demo_dataset(model, demos, 4, 3, generator())
    assert features.shape == ((3 + 1 + 6) * 3, model.feature_dim)
    assert chunks.shape == (30, 4, 7)
    row, shared = 0, generator()
    for demo in demos:
        feature = pretrain.episode_features(model, demo, 3, shared)
        assert feature.shape == (len(demo) + 1, 3, model.feature_dim)
        for t in range(len(demo) - 3):
            for k in range(3):
                assert torch.equal(features[row], feature[t, k])
                np.testing.assert_array_equal(chunks[row].numpy(), demo.action[t : t + 4])
                row += 1
    first = features[:3, CONFIG.world_model.deter_dim :]
    assert len(first.unique(dim=0)) > 1, "posterior samples of one frame differ"


def test_learning_rate_of_pretraining():
    config = PretrainConfig(steps=1000, lr=1e-3, lr_min=1e-5, warmup_steps=100)
    assert pretrain.learning_rate(0, config) == pytest.approx(1e-5 + 9.9e-4 / 100)
    assert pretrain.learning_rate(99, config) == pytest.approx(1e-3)
    assert pretrain.learning_rate(100, config) == pytest.approx(1e-3)
    assert pretrain.learning_rate(550, config) == pytest.approx(5.05e-4)
    assert pretrain.learning_rate(1000, config) == pytest.approx(1e-5)


def test_the_average_follows_the_weights():
    torch.manual_seed(0)
    model = WorldModel(CONFIG.world_model).requires_grad_(False)
    demos = [slider_episode(9, np.random.default_rng(0), 0.5, TASK)]
    trainer = pretrain.Pretrainer(CONFIG, model, demos)
    name, average = "net.out.weight", None
    for step in range(5):
        trainer.step(step)
        now = trainer.policy.state_dict()[name].clone()
        decay = min(0.995, step / (step + 10))
        average = now if average is None else decay * average + (1 - decay) * now
        torch.testing.assert_close(trainer.average.state_dict()[name], average)


def test_a_report_needs_no_solved_held_out_window(straight, tmp_path):
    run = RunFolder(tmp_path / "run", CONFIG, quiet=True)
    for name in ("collect", "world_model"):
        shutil.copytree(straight.dir(name), run.dir(name))
    rng = np.random.default_rng(0)
    episodes = play(11)
    write_store(run.dir("collect") / "play", [*episodes, slider_episode(40, rng, -3.0)])
    result = reward.train_reward(CONFIG, run)
    assert result["classifier"]["real"]["solved_windows"] == 0
    used = dataclasses.replace(CONFIG.reward, threshold=result["threshold"])
    assert load_classifier(run.dir("reward"))[1] == used
    assert used.threshold >= CONFIG.reward.threshold


def test_starts_keep_their_order(straight):
    starts = load_starts(straight.dir("collect") / "starts.npz")
    np.testing.assert_allclose(starts["scene_obs"][:, 0], np.linspace(0, 0.02, 5))


def test_actions_are_those_the_simulator_takes():
    chunk = torch.tensor([[[1.5, -2.0, 0.3, 0, 0, 0, 0.1], [0, 0, 0, 0, 0, 0, -0.001]]])
    expected = [[1.0, -1.0, 0.3, 0, 0, 0, 1.0], [0, 0, 0, 0, 0, 0, -1.0]]
    torch.testing.assert_close(env_action(chunk)[0], torch.tensor(expected))


def slots(order: list[int], steps: int = 9):
    """Actions `[steps, n, 7]` of slots that begin the given starts on made-up observations."""
    torch.manual_seed(0)
    model = WorldModel(CONFIG.world_model).requires_grad_(False)
    policy = DiffusionPolicy(model.feature_dim, CONFIG.policy).requires_grad_(False)
    group = evaluate.Slots(Agent(model, policy), len(order), LIMIT, seed=5)
    for slot, start in enumerate(order):
        group.begin(slot, start)
    out = []
    for t in range(steps):
        robot, scene = (torch.full((len(order), k), 0.01 * t) for k in (15, 24))
        out.append(group.act(robot, scene))
    return np.stack(out)


def test_an_episode_does_not_depend_on_its_neighbours():
    together = slots([3, 8, 1])
    for slot, start in enumerate([3, 8, 1]):
        # batches of another size sum in another order
        np.testing.assert_allclose(together[:, slot], slots([start])[:, 0], atol=1e-4)
    assert not np.allclose(together[:, 0], together[:, 1], atol=1e-3)


def test_a_slot_begins_anew():
    """After another episode, a slot acts as a fresh one: nothing of it is left."""
    torch.manual_seed(0)
    model = WorldModel(CONFIG.world_model).requires_grad_(False)
    policy = DiffusionPolicy(model.feature_dim, CONFIG.policy).requires_grad_(False)
    group = evaluate.Slots(Agent(model, policy), 2, LIMIT, seed=5)
    group.begin(0, 4)
    group.begin(1, 6)
    for _ in range(LIMIT + 2):  # also past the limit, as while others still run
        group.act(torch.ones(2, 15), torch.ones(2, 24))
    group.begin(0, 3)
    got = [
        group.act(torch.full((2, 15), 0.01 * t), torch.full((2, 24), 0.01 * t))[0] for t in range(9)
    ]
    np.testing.assert_allclose(np.stack(got), slots([3])[:, 0], atol=1e-4)
