"""PPO: vectors of section 11.7, schedules, ratio one, and a fine-tuning with a known answer."""

import dataclasses

import pytest
import torch

from diwa.config import FinetuneConfig, PolicyConfig, WorldModelConfig
from diwa.envs.dream import Dream
from diwa.nn.diffusion import DiffusionPolicy
from diwa.nn.world_model import WorldModel
from diwa.phases.finetune import Finetuner
from diwa.presets import PRESETS
from diwa.rl.ppo import chunk_log_prob, clip_schedule, denoising_discount, ppo_loss

DISCOUNT = [0.91352, 0.92274, 0.93207, 0.94148, 0.95099, 0.96060, 0.97030, 0.98010, 0.99, 1]
CLIP = [0.001, 0.001187, 0.001447, 0.00181, 0.002317, 0.003025, 0.004013, 0.005391, 0.007315, 0.01]


def test_discount_and_clip_vectors():
    discount, clip = denoising_discount(10, 0.99), clip_schedule(10, 0.01, 0.001, 3)
    torch.testing.assert_close(discount, torch.tensor(DISCOUNT), atol=6e-6, rtol=0)
    torch.testing.assert_close(clip, torch.tensor(CLIP), atol=6e-7, rtol=0)
    assert clip_schedule(1, 0.01, 0.001, 3).tolist() == pytest.approx([0.01])
    assert denoising_discount(1, 0.99).tolist() == [1.0]


def test_loss_of_the_test_vector():
    new = torch.tensor([[0.0005, 0.02], [-0.002, 0.003]], dtype=torch.float64)
    terms = ppo_loss(
        new,
        torch.zeros_like(new),
        torch.tensor([1.0, -1.0], dtype=torch.float64),
        torch.tensor([0.99, 1.0], dtype=torch.float64),
        torch.tensor([0.001, 0.01], dtype=torch.float64),
    )
    assert terms.policy_loss.item() == pytest.approx(-0.0014991758, abs=1e-9)
    assert terms.approx_kl.item() == pytest.approx(5.199205e-5, rel=1e-5)
    assert terms.clip_fraction.item() == 0.5


def test_the_gradient_stops_at_the_clip_only_where_it_would_help():
    new = torch.tensor([[0.5], [-0.5], [0.5], [-0.5]], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    one = torch.ones(1)
    ppo_loss(new, torch.zeros(4, 1), advantage, one, 0.1 * one).policy_loss.backward()
    assert new.grad[0] == 0 and new.grad[3] == 0
    assert new.grad[1] < 0 < new.grad[2]


def test_advantages_are_normalised():
    torch.manual_seed(0)
    new, old, advantage = torch.randn(8, 3), torch.randn(8, 3), torch.randn(8)
    rest = denoising_discount(3, 0.99), clip_schedule(3, 0.01, 0.001, 3)
    a = ppo_loss(new, old, advantage, *rest).policy_loss
    b = ppo_loss(new, old, 5 * advantage + 3, *rest).policy_loss
    torch.testing.assert_close(a, b)


def test_chunk_log_prob_clamps_then_averages():
    log_prob = torch.zeros(1, 2, 2, 7)
    log_prob[0, 0, 0, 0], log_prob[0, 1, 1, 6] = -100.0, 100.0
    torch.testing.assert_close(chunk_log_prob(log_prob), torch.tensor([[-5 / 14, 2 / 14]]))


class PushSuccess:
    """Success where the first number of the latent is above a threshold."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, feature, scene_start):
        return feature[..., 0] > self.threshold


class BanditModel(WorldModel):
    """World model without dynamics: the next latent only says what the last x push was."""

    def __init__(self) -> None:
        super().__init__(
            WorldModelConfig(
                deter_dim=8, stoch_groups=2, stoch_classes=2, hidden_dim=8, embed_dim=8, mlp_dim=8
            )
        )
        model = self.rssm
        plain = model.imagine

        def imagine(state, action, uniform):
            following = plain(state, action, uniform)
            h = torch.zeros_like(following.h)
            h[:, 0] = action[:, 0]
            return following._replace(h=h)

        model.imagine = imagine
        self.requires_grad_(False)


def bandit(seed: int = 0, **changes) -> Finetuner:
    """One-chunk episodes; success is an x push above 0.5 in the last action of the chunk."""
    torch.manual_seed(seed)
    values = dict(
        n_dreams=128,
        n_chunks=4,
        max_episode_steps=4,
        update_epochs=8,
        minibatches=2,
        actor_lr=1e-3,
        critic_lr=3e-3,
        critic_warmup=1,
        clip_coef=0.05,
        clip_coef_base=0.01,
        bc_coef=0.0,
        per_step_reward=False,
    )
    config = dataclasses.replace(
        PRESETS["tiny"], seed=seed, finetune=FinetuneConfig(**{**values, **changes})
    )
    model = BanditModel()
    base = DiffusionPolicy(model.feature_dim, PolicyConfig(width=32)).requires_grad_(False)
    c = config.finetune
    starts = torch.zeros(3, 15), torch.zeros(3, 24)
    dream = Dream(
        model, PushSuccess(0.5), *starts, c.n_dreams, c.max_episode_steps, c.per_step_reward
    )
    return Finetuner(config, model, base, dream)


@torch.no_grad()
def test_ratio_is_one_before_the_first_update():
    tuner = bandit()
    r = tuner.rollout()
    feature, chain, old = (x.flatten(0, 1) for x in (r.feature, r.chain, r.log_prob))
    new = chunk_log_prob(tuner.actor.chain_log_prob(feature, chain))
    torch.testing.assert_close((new - old).exp(), torch.ones_like(old), atol=1e-5, rtol=0)


def test_imagined_success_rises_on_a_bandit():
    tuner = bandit()
    before = tuner.imagined_success(512)
    rollouts = [tuner.iteration(i)["finetune/imagined_success"] for i in range(12)]
    after = tuner.imagined_success(512)
    assert rollouts[0] == pytest.approx(rollouts[1], abs=0.1), "only the critic learns at first"
    assert after > before + 0.35, (before, rollouts, after)
    assert rollouts[-1] > rollouts[0] + 0.25, rollouts


def test_warm_up_leaves_the_actor_alone_and_base_and_model_stay_frozen():
    tuner = bandit(update_epochs=1)
    frozen = [p.clone() for m in (tuner.base, tuner.world_model) for p in m.parameters()]
    start = [p.clone() for p in tuner.actor.parameters()]
    critic = [p.clone() for p in tuner.critic.parameters()]
    tuner.iteration(0)
    assert all(map(torch.equal, start, tuner.actor.parameters()))
    assert not all(map(torch.equal, critic, tuner.critic.parameters()))
    tuner.iteration(1)
    assert not all(map(torch.equal, start, tuner.actor.parameters()))
    after = [p for m in (tuner.base, tuner.world_model) for p in m.parameters()]
    assert all(map(torch.equal, frozen, after))
    assert all(p.grad is None for p in after)


def test_epochs_stop_at_the_target_kl():
    tuner = bandit(target_kl=-1.0, update_epochs=5)
    calls = []
    plain = tuner._minibatch
    tuner._minibatch = lambda *args: calls.append(1) or plain(*args)
    tuner.iteration(1)
    assert len(calls) == tuner.config.minibatches


def test_cloning_term_holds_the_policy_back():
    """With a large coefficient the actor stays nearer to the base's own chains."""

    def moved(coef: float) -> float:
        tuner = bandit(bc_coef=coef, bc_states=128)
        for i in range(1, 5):
            tuner.iteration(i)
        torch.manual_seed(1)
        feature = torch.randn(256, tuner.world_model.feature_dim)
        noise = tuner.base.noise(256, torch.Generator().manual_seed(0))
        chain = tuner.base.sample(feature, noise, ft_steps=10, explore=True).chain
        with torch.no_grad():
            own, other = (p.chain_log_prob(feature, chain) for p in (tuner.base, tuner.actor))
        return (own - other).mean().item()

    assert moved(5.0) < 0.5 * moved(0.0)


def test_same_seed_same_iterations():
    a, b, c = bandit(), bandit(), bandit(seed=1)
    rows = [[t.iteration(i) for i in range(2)] for t in (a, b, c)]
    assert rows[0] == rows[1] and rows[0] != rows[2]
