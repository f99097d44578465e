"""Windows of play, the classifier's threshold, and what is reported of a reward."""

import numpy as np
import pytest
import torch
from slider_runs import CONFIG, LIMIT, TASK, play, slider_episode

from diwa.config import RewardConfig
from diwa.data.windows import candidate_windows, draw_windows, halves
from diwa.envs.dream import ClassifierSuccess
from diwa.errors import StoreError
from diwa.nn.world_model import WorldModel
from diwa.phases import reward


def test_windows_begin_where_the_task_begins_and_know_their_label():
    episodes = play(12)
    places = candidate_windows(episodes, TASK, (0.0, 0.02), LIMIT)
    assert {s for _, _, s in places} == {True, False}
    for i, t, solved in places:
        slider = episodes[i].scene_obs[t : t + LIMIT, 0]
        assert len(slider) == LIMIT and slider[0] <= 0.021
        assert solved == bool((slider - slider[0] > 0.15).any())
    assert max(t for _, t, _ in places) <= 41 - LIMIT
    rng = np.random.default_rng(0)
    windows = draw_windows(episodes, TASK, (0.0, 0.02), LIMIT, 10, rng)
    n = windows.label.shape[1]
    assert windows.label.dtype == torch.bool and windows.label.shape == (LIMIT, n) and n <= 10
    assert windows.robot.shape == (LIMIT, n, 15) and windows.action.shape == (LIMIT, n, 7)
    slider = windows.scene[..., 0]
    assert torch.equal(windows.label, slider - slider[0] > 0.15)
    assert 0 < windows.label.any(0).sum() <= 5
    moved = (slider[:-1] + 0.04 * windows.action[1:, :, 0]).clamp(0, 0.28)
    torch.testing.assert_close(slider[1:], moved, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("drift", "missing"), [(-1.0, "solved"), (1.0, "failed")])
def test_play_without_success_or_failure_is_refused(drift, missing):
    rng = np.random.default_rng(0)
    episodes = [slider_episode(LIMIT, rng, 3 * drift) for _ in range(3)]
    rest = (episodes, TASK, (0.0, 0.02), LIMIT, 10, rng)
    with pytest.raises(StoreError, match=f"no {missing} window.*play-transitions"):
        draw_windows(*rest)
    assert draw_windows(*rest, need_both=False).label.any().item() == (drift > 0)


def test_imagined_features_begin_with_the_real_one_and_follow_the_prior():
    torch.manual_seed(0)
    model = WorldModel(CONFIG.world_model).requires_grad_(False)
    rng = np.random.default_rng(0)
    windows = draw_windows(play(), TASK, (0.0, 0.02), LIMIT, 6, rng)
    generator = torch.Generator().manual_seed(0)
    real, dreamed = reward.window_features(model, windows, generator)
    assert real.shape == dreamed.shape == (*windows.label.shape, model.feature_dim)
    assert torch.equal(real[0], dreamed[0])
    h, z = real[0].split([24, 16], -1)
    state = model.rssm.imagine(
        model.rssm.initial(len(h))._replace(h=h, z=z), windows.action[1], torch.rand(len(h), 4)
    )
    torch.testing.assert_close(dreamed[1, :, :24], state.h, atol=1e-6, rtol=1e-5)
    assert not torch.equal(real[1], dreamed[1])


class Known:
    """A classifier whose probability of success is the first number of the latent."""

    def success_probability(self, feature):
        return feature[..., 0]


@pytest.mark.parametrize(
    "share, expected",
    [(0.0, 0.9), (0.2, 0.9), (0.25, 0.8), (0.5, 0.7), (0.75, 0.5), (1.0, 0.5), (1.5, 0.5)],
)
def test_the_threshold_lets_through_the_share_of_failed_windows_that_is_allowed(share, expected):
    peaks = [0.99, 0.8, 0.3, 0.9, 0.7]  # the first window is solved, and of no account
    label = torch.zeros(4, 5, dtype=torch.bool)
    label[2:, 0] = True
    latents = torch.full((4, 5, 3), 0.1)
    latents[1, :, 0] = torch.tensor(peaks)
    config = RewardConfig(threshold=0.5, false_positives=share)
    threshold = reward.calibrated_threshold(Known(), config, latents, label)
    assert threshold == pytest.approx(expected)
    judged = ClassifierSuccess(Known(), threshold)(latents, None)[:, 1:].any(0)
    assert judged.float().mean() <= share


def test_without_failed_windows_the_threshold_stays():
    latents, label = torch.rand(4, 2, 3), torch.ones(4, 2, dtype=torch.bool)
    assert reward.calibrated_threshold(Known(), RewardConfig(), latents, label) == 0.5


def test_halves_share_no_window_but_a_single_one():
    rng = np.random.default_rng(0)
    windows = draw_windows(play(), TASK, (0.0, 0.02), LIMIT, 6, rng)
    first, second = halves(windows)
    joined = torch.stack([first.robot, second.robot], 2).flatten(1, 2)
    torch.testing.assert_close(joined, windows.robot[:, : joined.shape[1]])
    alone = halves(first._replace(robot=first.robot[:, :1], label=first.label[:, :1]))
    assert torch.equal(alone[0].robot, alone[1].robot) and alone[1].robot.shape[1] == 1


def test_precision_and_recall():
    label = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    predicted = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    scores = reward.precision_recall(predicted, label)
    assert scores["precision"] == pytest.approx(2 / 3) and scores["recall"] == pytest.approx(2 / 3)
    assert scores["episode_recall"] == 0.5 and scores["episode_false_positive"] == 0.5
    assert (scores["solved_windows"], scores["failed_windows"]) == (2, 2)
    nothing = reward.precision_recall(torch.zeros_like(label), torch.zeros_like(label))
    assert nothing["precision"] == nothing["recall"] == 0
