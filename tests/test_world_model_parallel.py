"""World-model training in two gloo processes: one process's result, resuming, one writer."""

import dataclasses

import numpy as np
import pytest
import torch
from ranks import run_ranks

from diwa import cli, parallel
from diwa.checkpoint import read_tensors
from diwa.data.store import Episode, write_store
from diwa.errors import DiwaError, RunError
from diwa.nn.vision import CAMERAS
from diwa.phases import world_model
from diwa.phases.world_model_trainer import Trainer
from diwa.presets import PRESETS
from diwa.run import Phase, RunFolder

CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    threads=1,
    world_model=dataclasses.replace(
        PRESETS["tiny"].world_model,
        **dict(deter_dim=24, stoch_groups=4, stoch_classes=4, hidden_dim=24, embed_dim=16),
        **dict(mlp_dim=24, steps=30, batch_size=4, seq_len=10, open_loop_steps=8, warmup_steps=5),
    ),
)


def prepare(path, pictures: bool = False) -> None:
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(8):
        action = rng.uniform(-1, 1, (30, 7)).astype(np.float32)
        robot, scene = np.zeros((31, 15), np.float32), np.zeros((31, 24), np.float32)
        robot[1:, :7] = np.cumsum(0.05 * action, 0)
        scene[:, 0] = robot[:, 0]
        frames = {}
        if pictures:
            shape = (31, 64, 64, 3)
            frames = {c: rng.integers(0, 256, shape).astype(np.uint8) for c in CAMERAS}
        episodes.append(Episode(robot, scene, action, frames=frames))
    write_store(path / "collect" / "play", episodes)


def with_model(**changes):
    model = dataclasses.replace(CONFIG.world_model, **changes)
    return dataclasses.replace(CONFIG, world_model=model)


def train(path, config=CONFIG) -> dict:
    return world_model.train_world_model(config, RunFolder(path, config, quiet=True))


def weights(path) -> dict[str, torch.Tensor]:
    return read_tensors(path / "world_model" / "model.safetensors")


def _in_two(folder, done) -> None:
    world_model.CHECKPOINT_EVERY = 10
    with parallel.session():
        result = train(folder / "two")
        assert result["parameters"] > 0 and result["open_loop"], "read from rank 0"
        assert train(folder / "two") == result, "a finished phase is not run again"
        plain = Phase.checkpoint
        for stops, name in ((2, "resumed"), (1, "handed_on")):

            def stop(self, *arguments):
                plain(self, *arguments)
                raise KeyboardInterrupt

            Phase.checkpoint = stop
            for _ in range(stops):
                with pytest.raises(KeyboardInterrupt):
                    train(folder / name)
                parallel.barrier()  # processes that end, end together
            Phase.checkpoint = plain
        train(folder / "resumed")
        with pytest.raises(RunError, match="world_model.batch_size is 3.* 2 processes"):
            train(folder / "odd", with_model(batch_size=3))
        if parallel.is_main():
            done.touch()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("one", "two", "resumed", "handed_on", "odd"):
        prepare(folder / name)
    run_ranks(_in_two, folder, folder / "done")
    assert (folder / "done").exists()
    return folder


def assert_same_training(path, other) -> None:
    """Equal up to the order of sums: float32 rounds at 6e-8, and Adam passes a relative error of a
    gradient on to the weights at the learning rate, 1e-3, in each of 30 steps. Another sample
    anywhere, such as from other uniforms or resets, changes weights by about 1e-3."""
    got, want = weights(path), weights(other)
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=2e-5)
    rows, other_rows = (
        RunFolder(p, CONFIG, quiet=True).metrics("world_model") for p in (path, other)
    )
    assert [row["step"] for row in rows] == [row["step"] for row in other_rows] == [0, 25, 29]
    for a, b in zip(rows, other_rows, strict=True):
        for key in ("loss", "reconstruction", "kl", "grad_norm"):
            assert a[f"world_model/{key}"] == pytest.approx(b[f"world_model/{key}"], rel=1e-3)
        assert 0 <= a["world_model/data_wait"] <= 1


def test_two_processes_train_what_one_trains(runs):
    train(runs / "one")
    assert_same_training(runs / "two", runs / "one")


def test_an_interrupted_training_of_two_ends_with_the_same_weights(runs):
    for key, value in weights(runs / "two").items():
        assert torch.equal(weights(runs / "resumed")[key], value), key


PICTURES = dict(observation="hybrid", cnn_depth=2, image_stride=4, batch_size=4, seq_len=9)
"""Of 4 streams of 9 frames the first has three reconstructed pictures, the others two each."""


def picture_step(path) -> dict[str, np.ndarray]:
    """Scalars and gradients of one step on pictures of noise."""
    config = with_model(**PICTURES)
    play = world_model._load_play(config, RunFolder(path, config, quiet=True))
    c = config.world_model
    trainer = Trainer(c, play.train, 0, "cpu", play.streamed, play.rows)
    with trainer.batches:
        scalars = trainer.metrics(trainer.step(0))
    del scalars["data_wait"]
    gradients = {name: p.grad.numpy() for name, p in trainer.model.named_parameters()}
    return scalars | gradients


def _picture_step_in_two(path) -> None:
    with parallel.session():
        found = picture_step(path)
        if parallel.is_main():
            np.savez(path / "two.npz", **found)


def test_two_processes_reconstruct_the_pictures_that_one_does(tmp_path):
    prepare(tmp_path, pictures=True)
    run_ranks(_picture_step_in_two, tmp_path)
    one = picture_step(tmp_path)
    with np.load(tmp_path / "two.npz") as two:
        assert set(two.files) == set(one) and "pictures" in one
        for name, value in one.items():
            # the order of sums, in float32, over 12288 colours of a picture
            scale = np.abs(value).max()
            np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=1e-4 * scale, err_msg=name)


def test_one_process_goes_on_where_two_stopped(runs):
    assert (runs / "handed_on" / "world_model" / "training_state").exists()
    train(runs / "handed_on")
    assert_same_training(runs / "handed_on", runs / "two")


def test_one_process_writes(runs):
    run = RunFolder(runs / "two", CONFIG, quiet=True)
    assert len(run.metrics()) == 3, "rows once"
    files = {p.name for p in (runs / "two" / "world_model").iterdir()}
    assert files == {"config.json", "model.safetensors", "dream.npz", "result.json"}
    assert len(list((runs / "two" / "tensorboard").rglob("events.*"))) <= 1


def test_only_some_commands_are_for_several_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    options = cli.Options(run_dir=tmp_path / "run")
    for command in ("run", "evaluate", "collect"):
        with pytest.raises(DiwaError, match=f"`diwa {command}` is one process"):
            cli._run(command, options)
