"""Phase 3: success classifier on real and imagined latents (method section 4)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diwa.agent import load_world_model, save_classifier, source_folder, world_model_folder
from diwa.config import Config, to_dict
from diwa.data.sampler import previous_actions, split_episodes
from diwa.data.store import Episode, EpisodeStore
from diwa.envs.dream import ClassifierSuccess, DecoderSuccess, SuccessFunction
from diwa.envs.tasks import RULES, task_success
from diwa.errors import StoreError
from diwa.nn.encoders import to_tensor
from diwa.nn.heads import RewardClassifier
from diwa.nn.rssm import RSSMState
from diwa.nn.world_model import WorldModel
from diwa.phases.collect import load_starts
from diwa.run import RunFolder

LOG_EVERY = 50


class Windows(NamedTuple):
    """Equally long cuts from episodes, time first.

    Attributes:
        robot, scene, action: `[T, n, ...]`; action led to the frame.
        label: `[T, n]` bool, the task is solved relative to the first frame.
        frames: camera -> uint8 `[T, n, h, w, 3]`, of the cameras that were asked for.
    """

    robot: Tensor
    scene: Tensor
    action: Tensor
    label: Tensor
    frames: dict[str, Tensor]


def candidate_windows(
    episodes: list[Episode], task: str, start_value: tuple[float, float], length: int
) -> list[tuple[int, int, bool]]:
    """Places (episode, frame, solved within the window) where the task could begin.

    A frame qualifies if its fixture stands in the range `start_value` of the task's own starts.
    """
    index = RULES[task].index
    places = []
    for i, episode in enumerate(episodes):
        value = episode.scene_obs[:, index]
        fits = (value >= start_value[0] - 1e-3) & (value <= start_value[1] + 1e-3)
        for t in range(0, len(episode) + 2 - length, 4):
            if fits[t]:
                scenes = episode.scene_obs[t : t + length]
                places.append((i, t, bool(task_success(task, scenes[0], scenes).any())))
    return places


def draw_windows(
    episodes: list[Episode],
    task: str,
    start_value: tuple[float, float],
    length: int,
    count: int,
    rng: np.random.Generator,
    *,
    need_both: bool = True,
    cameras: Sequence[str] = (),
) -> Windows:
    """Up to `count` windows, half of them solved; the rest are misses and other behaviour.

    Raises:
        StoreError: the play never solves, or never fails, the task (with `need_both` off: it has
            no window at all).
    """
    places = candidate_windows(episodes, task, start_value, length)
    chosen: list[tuple[int, int]] = []
    for solved in (True, False):
        group = [(i, t) for i, t, s in places if s == solved]
        if not group and (need_both or not places):
            raise StoreError(
                f"the play holds no {'solved' if solved else 'failed'} window of {task}; "
                "collect more play (--collect.play-transitions)"
            )
        take = rng.permutation(len(group))[: count // 2]
        chosen += [group[k] for k in take]
    cut = [(episodes[i], slice(t, t + length)) for i, t in chosen]
    label = np.stack([task_success(task, e.scene_obs[s][0], e.scene_obs[s]) for e, s in cut], 1)
    return Windows(
        torch.stack([to_tensor(e.robot_obs[s]) for e, s in cut], 1),
        torch.stack([to_tensor(e.scene_obs[s]) for e, s in cut], 1),
        torch.stack([to_tensor(previous_actions(e.action)[s]) for e, s in cut], 1),
        torch.from_numpy(label),
        {
            name: torch.from_numpy(np.stack([e.frames[name][s] for e, s in cut], 1))
            for name in cameras
        },
    )


def window_features(
    model: WorldModel, windows: Windows, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Features `[T, n, F]` of windows: posterior, and the prior rolled out from the first frame.

    Both begin at the zero state, as episodes and dreams do. The imagined ones inherit the labels
    of the real frames.
    """
    device = model.codec.mean.device
    robot, scene, action = (v.to(device) for v in windows[:3])
    length, n = robot.shape[:2]
    reset = torch.zeros(length, n, device=device)
    reset[0] = 1.0
    real = model.encode_episode(
        model.observation(robot, scene, **windows.frames),
        action,
        reset,
        model.uniform(length, n, generator=generator),
    )
    deter = model.rssm.deter_dim
    first = RSSMState(real[0, :, :deter], real[0, :, deter:])
    dreamed = model.open_loop(first, action[1:], model.uniform(length - 1, n, generator=generator))
    return real, torch.cat([real[:1], dreamed])


def precision_recall(predicted: Tensor, label: Tensor) -> dict[str, float]:
    """Frame-wise precision and recall, and episode-wise rates.

    Both arguments are bool `[T, n]`. `episode_false_positive` is the share of failed windows with
    any predicted success; `episode_recall` the share of solved windows that are noticed.
    """
    hit = (predicted & label).sum().item()
    episode_label, episode_predicted = label.any(0), predicted.any(0)
    failures, solved = (~episode_label).sum().item(), episode_label.sum().item()
    return {
        "precision": hit / max(1, predicted.sum().item()),
        "recall": hit / max(1, label.sum().item()),
        "episode_recall": (episode_predicted & episode_label).sum().item() / max(1, solved),
        "episode_false_positive": (episode_predicted & ~episode_label).sum().item()
        / max(1, failures),
        "solved_windows": solved,
        "failed_windows": failures,
    }


def success_function(config: Config, run: RunFolder, model: WorldModel) -> SuccessFunction:
    """The trained classifier of the run or, for `reward.kind = decoder`, the task's own rule."""
    if config.reward.kind == "decoder":
        return DecoderSuccess(model, config.task)
    from diwa.agent import load_classifier

    classifier, reward = load_classifier(run.dir("reward"), config.device)
    return ClassifierSuccess(classifier, reward.threshold)


def _train(
    config: Config, classifier: RewardClassifier, features: Tensor, labels: Tensor, phase
) -> None:
    c = config.reward
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=c.lr, weight_decay=c.weight_decay)
    generator = torch.Generator(features.device).manual_seed(config.seed)
    groups = [labels.nonzero()[:, 0], (~labels).nonzero()[:, 0]]
    share = (c.batch_size // 3, c.batch_size - c.batch_size // 3)
    for step in range(c.steps):
        picks = [
            g[torch.randint(len(g), (k,), generator=generator, device=g.device)]
            for g, k in zip(groups, share, strict=True)
        ]
        index = torch.cat(picks)
        loss = classifier.loss(
            features[index],
            labels[index].long(),
            contrastive_weight=c.contrastive_weight,
            temperature=c.temperature,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % LOG_EVERY == 0 or step == c.steps - 1:
            phase.log(step, {"reward/loss": loss.item()})


def train_reward(config: Config, run: RunFolder) -> dict:
    """Train the classifier on labelled windows of play; report both rewards on held-out windows.

    The phase is short and starts over when it was interrupted.
    """
    with run.phase("reward", config.reward.steps, "reward/loss") as phase:
        if phase.result is not None:
            return phase.result
        torch.set_num_threads(config.threads)
        c, device = config.reward, config.device
        model = load_world_model(world_model_folder(config, run.path), device)
        store = EpisodeStore(source_folder(config, run.path) / "collect" / "play")
        episodes = list(store)
        train, held = split_episodes(episodes, config.world_model.holdout)
        starts = load_starts(run.dir("collect") / "starts.npz")["scene_obs"]
        value = starts[:, RULES[config.task].index]
        bounds = (float(value.min()), float(value.max()))
        length = config.finetune.max_episode_steps
        rng = np.random.default_rng(config.seed)
        generator = torch.Generator(device).manual_seed(config.seed)
        windows = draw_windows(
            [episodes[i] for i in train],
            config.task,
            bounds,
            length,
            c.windows,
            rng,
            cameras=model.cameras,
        )
        real, dreamed = window_features(model, windows, generator)
        features = torch.cat([real, dreamed]).flatten(0, 1)
        labels = windows.label.to(device).repeat(2, 1).flatten()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            classifier = RewardClassifier(model.feature_dim, c.width).to(device)
        _train(config, classifier, features, labels, phase)
        meta = {"config": to_dict(c), "task": config.task, "feature_dim": model.feature_dim}
        save_classifier(phase.dir, classifier, meta)
        classifier.requires_grad_(False)
        report = {}
        with contextlib.suppress(StoreError):  # little play may leave nothing to report on
            test = draw_windows(
                [episodes[i] for i in held],
                config.task,
                bounds,
                length,
                c.windows,
                rng,
                need_both=False,
                cameras=model.cameras,
            )
            report = reward_report(config, model, ClassifierSuccess(classifier, c.threshold), test)
        return phase.finish({"windows": windows.label.shape[1], **report})


@torch.no_grad()
def reward_report(
    config: Config, model: WorldModel, classifier: SuccessFunction, windows: Windows
) -> dict:
    """Precision and recall of classifier and decoder rewards on real and imagined latents."""
    device = config.device
    generator = torch.Generator(device).manual_seed(config.seed + 1)
    real, dreamed = window_features(model, windows, generator)
    scene_start = windows.scene[0].to(device)
    judges = {"classifier": classifier}
    if model.predicts_state:
        judges["decoder"] = DecoderSuccess(model, config.task)
    return {
        name: {
            kind: precision_recall(judge(features, scene_start).cpu(), windows.label)
            for kind, features in (("real", real), ("imagined", dreamed))
        }
        for name, judge in judges.items()
    }
