"""Vision and hybrid world models: what is seen, what is predicted, the loss, training from disk."""

import dataclasses

import numpy as np
import pytest
import torch

from diwa.agent import check_source, load_world_model, save_world_model
from diwa.config import Config, WorldModelConfig
from diwa.data.sampler import store_rows
from diwa.data.store import Episode, write_store
from diwa.envs.dream import DecoderSuccess, Dream
from diwa.errors import RunError, StoreError
from diwa.nn import pixels
from diwa.nn.pixels import PixelDecoder
from diwa.nn.vision import VisionConfig, VisionDecoder, VisionEncoder, picture_input
from diwa.nn.world_model import WorldModel
from diwa.phases.open_loop import draw_places
from diwa.phases.open_loop_pictures import CONTEXT, picture_report
from diwa.phases.world_model import _pictures
from diwa.phases.world_model_trainer import Trainer
from diwa.picture_metrics import psnr, squared_error, ssim

HYBRID = WorldModelConfig(
    observation="hybrid",
    cnn_depth=2,
    deter_dim=16,
    stoch_groups=4,
    stoch_classes=4,
    hidden_dim=16,
    mlp_dim=16,
    detail_weight=1.0,
    image_stride=2,
)
VISION = dataclasses.replace(HYBRID, observation="vision")
T, B = 4, 3
CAMERAS = ("rgb_static", "rgb_gripper")


def build(config=HYBRID) -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(config)


def batch(size=64):
    g = torch.Generator().manual_seed(1)
    obs = {"state": torch.randn(T, B, 24, generator=g)}
    for camera in CAMERAS:
        shape = (T, B, size, size, 3)
        obs[camera] = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    reset = torch.zeros(T, B)
    return obs, torch.randn(T, B, 7, generator=g), reset, torch.rand(T, B, 4, generator=g)


@pytest.mark.parametrize(("size", "depth", "dim"), [(64, 48, 1536), (224, 12, 1536)])
def test_sizes_of_the_paper(size, depth, dim):
    """Section 1.2 and 1.4: both variants end in 1536 numbers and give the picture size back."""
    config = VisionConfig(depth=depth, image_size=size)
    assert (config.image_dim, config.embed_dim) == (dim, dim + 18)
    if size == 224:
        with torch.no_grad(), torch.device("meta"):
            encoder, decoder = VisionEncoder(config), VisionDecoder(config, 2048)
            obs = {c: torch.empty(1, 3, size, size) for c in CAMERAS}
            assert encoder({**obs, "proprio": torch.empty(1, 18)}).shape == (1, dim + 18)
            assert decoder(torch.empty(1, 2048))["rgb_static"].shape == (1, 3, size, size)
        layers = [m for m in encoder.rgb_static if isinstance(m, torch.nn.Conv2d)]
        assert [m.out_channels for m in layers] == [12, 24, 48, 96, 192, 384]
        layers = [m for m in decoder.rgb_static if isinstance(m, torch.nn.ConvTranspose2d)]
        assert [m.out_channels for m in layers] == [192, 96, 96, 48, 48, 3]


@torch.no_grad()
@pytest.mark.parametrize("config", [HYBRID, VISION], ids=["hybrid", "vision"])
def test_sees_pictures_and_robot_but_not_the_scene(config):
    model, (obs, *_) = build(config), batch()
    embed = model.encoder(obs)
    assert embed.shape == (T, B, 2 * 32 + 18)
    scene = {**obs, "state": obs["state"].clone()}
    scene["state"][..., 18:] += 1
    assert torch.equal(model.encoder(scene), embed)
    assert torch.equal(model.encoder({**obs, "state": obs["state"][..., :18]}), embed)
    for name in ("state", *CAMERAS):
        changed = {**obs, name: obs[name].clone()}
        changed[name][0, 0] = 0
        difference = (model.encoder(changed) != embed).any(-1)
        assert difference[0, 0] and difference.sum() == 1, name


@torch.no_grad()
def test_pieces_are_the_whole(monkeypatch):
    model, (obs, *_) = build(), batch()
    whole, feature = model.encoder(obs), torch.rand(T, B, model.feature_dim)
    frames = model.decode_frames(feature)
    monkeypatch.setattr(pixels, "PIECE", 5)
    torch.testing.assert_close(model.encoder(obs), whole)
    for camera, pieces in model.decode_frames(feature).items():
        # a last bit of the network may move a number that is rounded to uint8
        assert (pieces.int() - frames[camera].int()).abs().max() <= 1


def test_loss_is_that_of_the_method():
    """Pictures: half the squared error summed over cameras, colours and pixels (section 1.6), of
    every second frame; state: as without pictures."""
    model, (obs, action, reset, uniform) = build(), batch()
    loss = model.loss(obs, action, reset, model.rssm.initial(B), uniform)
    post = model.rssm.observe(model.encoder(obs), action, reset, model.rssm.initial(B), uniform)
    feature = torch.cat([post.h, post.z], -1)
    guess = VisionDecoder.forward(model.decoder, feature)
    pictures = torch.zeros(T, B)
    for camera in CAMERAS:
        error = (guess[camera] - picture_input(obs[camera])).square()
        pictures += 0.5 * error.sum((-3, -2, -1))
    seen = torch.tensor([[(t + b) % 2 == 0 for b in range(B)] for t in range(T)])
    torch.testing.assert_close(loss.parts["pictures"], pictures[seen].mean().detach())
    state = 0.5 * (model.decoder.state(feature) - obs["state"]).square().sum(-1).mean()
    torch.testing.assert_close(loss.reconstruction, state.detach())
    kl = loss.total - HYBRID.state_weight * state - HYBRID.image_weight * pictures[seen].mean()
    torch.testing.assert_close(kl, HYBRID.kl_weight * loss.kl, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", [HYBRID, VISION], ids=["hybrid", "vision"])
def test_every_parameter_learns(config):
    model, (obs, action, reset, uniform) = build(config), batch()
    loss = model.loss(obs, action, reset, model.rssm.initial(B), uniform)
    loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert set(loss.parts) == ({"pictures", "state"} if config is HYBRID else {"pictures"})


@torch.no_grad()
def test_dreams_never_make_pictures(monkeypatch):
    def refuse(*_):
        raise AssertionError("the CNN decoder was run")

    model, n = build(), 5
    monkeypatch.setattr(PixelDecoder, "forward", refuse)
    monkeypatch.setattr(VisionDecoder, "forward", refuse)
    g = torch.Generator().manual_seed(0)
    frames = {c: torch.randint(0, 256, (n, 64, 64, 3), dtype=torch.uint8) for c in CAMERAS}
    success = DecoderSuccess(model, "move_slider_left")
    robot, scene = torch.rand(n, 15), torch.rand(n, 24)
    dream = Dream(model, success, robot, scene, n, 8, frames=frames)
    dream.reset(torch.ones(n, dtype=torch.bool), torch.rand(n, generator=g), torch.rand(n, 4))
    feature, _, _ = dream.step(torch.zeros(n, 4, 7), torch.rand(4, n, 4))
    assert feature.shape == (n, model.feature_dim)
    robot, scene = model.decode(feature)
    assert robot.shape == (n, 15) and scene.shape == (n, 24)


def test_vision_predicts_no_scene():
    model = build(VISION)
    assert not model.predicts_state and build().predicts_state
    with pytest.raises(ValueError, match="--observation hybrid"):
        model.decode(torch.zeros(1, model.feature_dim))


def test_observations_that_cannot_be_seen():
    model, robot = build(), torch.zeros(2, 15)
    frame = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="rgb_gripper is missing"):
        model.observation(robot, rgb_static=frame)
    with pytest.raises(ValueError, match=r"rgb_static is \(32, 32, 3\)"):
        model.observation(robot, rgb_static=frame[:, :32, :32], rgb_gripper=frame)
    with pytest.raises(ValueError, match="needs scene_obs"):
        WorldModel(WorldModelConfig(deter_dim=8)).observation(robot)
    assert model.inputs == ("robot_obs", *CAMERAS)


def test_saved_and_lent_models_say_what_they_see(tmp_path):
    model, (obs, *_) = build(), batch()
    save_world_model(tmp_path / "world_model", model)
    again = load_world_model(tmp_path / "world_model")
    assert torch.equal(again.encoder(obs), model.encoder(obs))
    config = Config(from_run=str(tmp_path), world_model=HYBRID)
    check_source(config)
    for other in ({"observation": "state"}, {"image_size": 224}):
        own = dataclasses.replace(HYBRID, **other)
        with pytest.raises(RunError, match="--observation hybrid --world-model.image-size 64"):
            check_source(dataclasses.replace(config, world_model=own))


# ---------------------------------------------------------------- training from frames on disk


def moving_square(count: int, length: int, seed: int) -> list[Episode]:
    """A bright square that follows the pushes; the slider is where the square is."""
    rng, episodes = np.random.default_rng(seed), []
    for _ in range(count):
        action = np.zeros((length, 7), np.float32)
        action[:, 0] = np.repeat(rng.choice([-1.0, 1.0], -(-length // 8)), 8)[:length]
        place = np.clip(30 + np.cumsum(np.append(rng.integers(-20, 20), 3 * action[:, 0])), 0, 52)
        scene = np.zeros((length + 1, 24), np.float32)
        scene[:, 0] = place / 52 * 0.28
        frames = np.full((length + 1, 64, 64, 3), 40, np.uint8)
        for t, x in enumerate(place.astype(int)):
            frames[t, 20:44, x : x + 12] = (230, 200, 60)
        robot = np.zeros((length + 1, 15), np.float32)
        pictures = dict.fromkeys(CAMERAS, frames)
        episodes.append(Episode(robot, scene, action, frames=pictures))
    return episodes


def trainer(store, config, seed=0) -> Trainer:
    rows = store_rows(store.starts, store.lengths, range(len(store)))
    columns = _pictures(store, config.picture_size)
    return Trainer(config, list(store), seed, "cpu", columns, rows)


def test_training_reads_the_frames_of_its_states(tmp_path):
    store = write_store(tmp_path / "play", moving_square(3, 20, 0))
    with trainer(store, dataclasses.replace(HYBRID, batch_size=2, seq_len=5)).batches as batches:
        seen = batches.batch(1)
    assert seen["rgb_static"].dtype == torch.uint8 and seen["rgb_static"].shape[:2] == (5, 2)
    codec = trainer(store, HYBRID).model.codec
    slider = seen["state"][..., 18] * codec.std[18] + codec.mean[18]
    left = (seen["rgb_static"][..., 30, :, 0] > 100).int().argmax(-1)
    torch.testing.assert_close(slider / 0.28 * 52, left.float(), atol=1e-3, rtol=0)


def test_training_learns_where_the_square_is_and_dreams_it(tmp_path):
    config = dataclasses.replace(
        HYBRID,
        deter_dim=32,
        hidden_dim=32,
        steps=80,
        batch_size=8,
        seq_len=6,
        lr=4e-3,
        warmup_steps=10,
        image_weight=0.02,
    )
    store = write_store(tmp_path / "play", moving_square(12, 60, 0))
    training = trainer(store, config)
    losses = [training.step(i) for i in range(config.steps)]
    last = {k: np.mean([x[k].item() for x in losses[-10:]]) for k in ("reconstruction", "pictures")}
    assert last["pictures"] < 0.3 * losses[0]["pictures"].item()
    assert last["reconstruction"] < 0.3 * losses[0]["reconstruction"].item()
    model = training.model.requires_grad_(False)
    report, films = picture_report(model, moving_square(6, 40, 1), 20, seed=0)
    for scores in report["cameras"].values():
        better = np.array(scores["psnr"]["model"]) > np.array(scores["psnr"]["copy"])
        assert better[5:].mean() > 0.5  # the square moves on, a copy of it does not
    assert films["dream_rgb_static"].shape == films["real_rgb_static"].shape == (4, 20, 64, 64, 3)
    assert films["dream_rgb_static"].dtype == np.uint8


def test_a_frozen_encoder_is_left_alone_and_changes_no_loss(tmp_path):
    """Embeddings from before are those of the frames: only the encoder stops learning."""
    store = write_store(tmp_path / "play", moving_square(3, 20, 0))
    config = dataclasses.replace(HYBRID, steps=4, batch_size=2, seq_len=5)
    freezing, learning = (
        trainer(store, dataclasses.replace(config, frozen_encoder_steps=n)) for n in (2, 0)
    )
    weights, losses = [], []
    for step in range(4):
        losses.append([t.step(step)["loss"].item() for t in (freezing, learning)])
        weights.append({k: v.clone() for k, v in freezing.model.state_dict().items()})
    # a step's loss is that before its update, so the first frozen one still agrees
    np.testing.assert_allclose(*np.transpose(losses[:3]), rtol=1e-5)
    assert losses[3][0] != losses[3][1]
    for name, last in weights[3].items():
        if name.startswith("encoder."):
            assert not torch.equal(weights[0][name], weights[1][name]), name
            assert torch.equal(weights[1][name], last), name
        elif not name.startswith("codec."):
            assert not torch.equal(weights[1][name], last), name


def test_a_training_resumed_with_a_frozen_encoder_goes_on_as_if_never_stopped(tmp_path):
    store = write_store(tmp_path / "play", moving_square(3, 20, 0))
    config = dataclasses.replace(HYBRID, steps=5, batch_size=2, seq_len=5, frozen_encoder_steps=4)
    whole, resumed = trainer(store, config), trainer(store, config)
    for step in range(3):
        whole.step(step)
    for part in ("model", "optimizer"):
        getattr(resumed, part).load_state_dict(getattr(whole, part).state_dict())
    resumed.generator.set_state(whole.generator.get_state())
    resumed.carried = whole.carried
    for step in (3, 4):
        expected = whole.step(step)["loss"]
        torch.testing.assert_close(resumed.step(step)["loss"], expected, rtol=1e-6, atol=0)


def test_bfloat16_learns_from_pictures_as_float32_does(tmp_path):
    store = write_store(tmp_path / "play", moving_square(6, 40, 0))
    config = dataclasses.replace(HYBRID, steps=40, batch_size=4, seq_len=6, lr=4e-3)
    config = dataclasses.replace(config, warmup_steps=5, frozen_encoder_steps=10)
    exact, rounded = (
        trainer(store, dataclasses.replace(config, precision=p)) for p in ("float32", "bfloat16")
    )
    losses = np.array(
        [[t.step(i)["loss"].item() for t in (exact, rounded)] for i in range(config.steps)]
    )
    # operands keep 8 bits; later, another sample here and there changes the loss by more
    assert losses[0, 1] == pytest.approx(losses[0, 0], rel=0.02) and losses[0, 0] != losses[0, 1]
    assert losses[-5:].mean(0)[1] == pytest.approx(losses[-5:].mean(0)[0], rel=0.2)
    assert losses[-5:].mean() < 0.5 * losses[0].mean()
    assert all(p.dtype == torch.float32 for p in rounded.model.parameters())


def test_play_without_the_right_pictures_is_refused(tmp_path):
    plain = [dataclasses.replace(e, frames={}) for e in moving_square(1, 5, 0)]
    store = write_store(tmp_path / "plain", plain)
    with pytest.raises(StoreError, match="holds no pictures of rgb_static"):
        _pictures(store, 64)
    assert _pictures(store, 0) == {}
    with pytest.raises(StoreError, match=r"\(64, 64, 3\) of rgb_static.*\(224, 224, 3\)"):
        _pictures(write_store(tmp_path / "play", moving_square(1, 5, 0)), 224)


# ---------------------------------------------------------------- scores of dreamed pictures


def test_scores_of_a_copy_are_those_of_the_last_frame_seen():
    episodes = moving_square(2, 30, 3)
    report, films = picture_report(build(), episodes, 10, seed=0)
    places = draw_places(episodes, CONTEXT + 10, 32, 0)
    assert (report["context"], report["windows"]) == (CONTEXT, len(places))
    cuts = [episodes[i].frames["rgb_static"][t : t + CONTEXT + 10] for i, t in places]
    after = [c[CONTEXT:].astype(float) for c in cuts]
    error = [(a - c[CONTEXT - 1]) ** 2 for a, c in zip(after, cuts, strict=True)]
    expected = 10 * np.log10(255**2 / np.mean(error, axis=(0, 2, 3, 4)))
    scores = report["cameras"]["rgb_static"]
    np.testing.assert_allclose(scores["psnr"]["copy"], expected, rtol=1e-4)
    assert len(scores["ssim"]["model"]) == 10
    most = max(range(len(cuts)), key=lambda k: np.mean(error[k]))
    np.testing.assert_array_equal(films["real_rgb_static"][0], cuts[most][CONTEXT:])
    assert picture_report(WorldModel(WorldModelConfig(deter_dim=8)), episodes, 10, 0) == ({}, {})


def test_psnr_and_ssim():
    rng = np.random.default_rng(0)
    a = torch.from_numpy(rng.integers(0, 256, (2, 16, 18, 3)).astype(np.uint8))
    b = torch.from_numpy(rng.integers(0, 256, (2, 16, 18, 3)).astype(np.uint8))
    error = ((a.numpy().astype(float) - b.numpy()) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(squared_error(a, b), error, rtol=1e-5)
    np.testing.assert_allclose(psnr(torch.tensor([255.0**2, 650.25])), [0, 20], atol=1e-4)
    np.testing.assert_allclose(ssim(a, a), 1, atol=1e-5)
    np.testing.assert_allclose(ssim(a, b), plain_ssim(a.numpy(), b.numpy()), atol=1e-5)


def plain_ssim(a, b):
    """Window by window, in float64."""
    offset = np.arange(11) - 5
    weight = np.exp(-(offset[:, None] ** 2 + offset**2) / (2 * 1.5**2))
    weight /= weight.sum()
    c1, c2 = 2.55**2, 7.65**2
    out = []
    for x, y in zip(a.astype(float), b.astype(float), strict=True):
        values = []
        for i in range(x.shape[0] - 10):
            for j in range(x.shape[1] - 10):
                for color in range(3):
                    p, q = (v[i : i + 11, j : j + 11, color] for v in (x, y))
                    mp, mq = (weight * p).sum(), (weight * q).sum()
                    vp, vq = ((weight * (v - m) ** 2).sum() for v, m in ((p, mp), (q, mq)))
                    cov = (weight * (p - mp) * (q - mq)).sum()
                    top = (2 * mp * mq + c1) * (2 * cov + c2)
                    values.append(top / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
        out.append(np.mean(values))
    return out
