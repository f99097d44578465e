"""PPO: vectors of section 11.7, schedules, ratio one, and a fine-tuning with a known answer."""

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diwa.config import FinetuneConfig, PolicyConfig, WorldModelConfig
from diwa.envs.dream import Dream
from diwa.nn.diffusion import DiffusionPolicy
from diwa.nn.world_model import WorldModel
from diwa.phases.finetune import Finetuner
from diwa.presets import PRESETS
from diwa.rl.ppo import chunk_log_prob, clip_schedule, denoising_discount, ppo_loss
from diwa.rl.update import PPOUpdate

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


def bandit(seed: int = 0, device: str = "cpu", **changes) -> Finetuner:
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
        PRESETS["tiny"],
        seed=seed,
        device=device,
        finetune=FinetuneConfig(**{**values, **changes}),
    )
    model = BanditModel().to(device)
    base = DiffusionPolicy(model.feature_dim, PolicyConfig(width=32)).requires_grad_(False)
    base, c = base.to(device), config.finetune
    starts = torch.zeros(3, 15, device=device), torch.zeros(3, 24, device=device)
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
    plain = tuner.ppo._steps[True].fn
    tuner.ppo._steps[True].fn = lambda batch: calls.append(1) or plain(batch)
    tuner.iteration(1)
    assert len(calls) == tuner.config.minibatches == tuner.ppo.steps


def reference_epochs(tuner: Finetuner, data: dict, fused: bool) -> tuple[list, dict, int]:
    """PPO's epochs as a plain loop that the host leaves: optimizers, means, epochs."""
    c, actor, critic = tuner.config, tuner.actor, tuner.critic
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=lr, weight_decay=0.0, fused=fused or None)
        for m, lr in ((actor, c.actor_lr), (critic, c.critic_lr))
    ]
    kf, rows = c.ft_denoising_steps, []
    rest = (
        denoising_discount(kf, c.gamma_denoising),
        clip_schedule(kf, c.clip_coef, c.clip_coef_base, 3),
    )
    for _ in range(c.update_epochs):
        order = torch.randperm(len(data["feature"]), generator=tuner.generator)
        for index in order.chunk(c.minibatches):
            feature, chain, old, advantage, returns = (column[index] for column in data.values())
            new = chunk_log_prob(actor.chain_log_prob(feature, chain))
            terms = ppo_loss(new, old, advantage, *rest)
            value_loss = 0.5 * (critic(feature) - returns).square().mean()
            for optimizer in optimizers:
                optimizer.zero_grad()
            (terms.policy_loss + c.vf_coef * value_loss).backward()
            for optimizer in optimizers:
                optimizer.step()
            rows.append([t.item() for t in (terms.policy_loss, value_loss, terms.approx_kl)])
        if torch.tensor(rows[-c.minibatches :])[:, 2].mean() > c.target_kl:
            break
    means = torch.tensor(rows).mean(0).tolist()
    names = ("policy_loss", "value_loss", "approx_kl")
    return optimizers, dict(zip(names, means, strict=True)), len(rows) // c.minibatches


@pytest.mark.parametrize("gated", [False, True], ids=["host", "device"])
def test_the_kl_stop_leaves_everything_as_leaving_the_loop_does(gated):
    """Weights, moments and step counts, bit for bit; the limit is passed amid the epochs."""
    tuners = [bandit(actor_lr=1e-2, target_kl=2.2e-3, minibatches=3) for _ in range(2)]
    tuner, plain = tuners
    data = {
        "feature": torch.randn(60, tuner.world_model.feature_dim),
        "chain": torch.randn(60, 11, 4, 7).clamp(-1, 1),
        "log_prob": torch.randn(60, 10) * 0.1,
        "advantage": torch.randn(60),
        "returns": torch.randn(60),
    }
    with torch.no_grad():
        data["log_prob"] = chunk_log_prob(
            tuner.actor.chain_log_prob(data["feature"], data["chain"])
        )
    c = tuner.config
    ppo = PPOUpdate(c, tuner.actor, tuner.critic, tuner.frozen_base, tuner.generator, gated)
    means = ppo.run(data, train_actor=True)
    optimizers, expected, epochs = reference_epochs(plain, data, fused=gated)
    assert 1 < epochs < c.update_epochs, f"stopped after {epochs} epochs: nothing is tested"
    assert ppo.steps == epochs * c.minibatches
    for name, value in expected.items():  # sums of float32 in another order
        assert means[name].item() == pytest.approx(value, rel=1e-5, abs=1e-7), name
    for a, b in zip((ppo.actor_optimizer, ppo.critic_optimizer), optimizers, strict=True):
        ours, theirs = ([o.state[p] for p in o.param_groups[0]["params"]] for o in (a, b))
        for x, y in zip(ours, theirs, strict=True):
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    for name in ("actor", "critic"):
        weights = [getattr(t, name).parameters() for t in tuners]
        assert all(map(torch.equal, *weights)), name


def test_a_gated_iteration_begins_anew_and_numbers_that_overflow_are_not_counted():
    """After a stop, the next iteration learns again; what gated steps find is in no metric."""
    tuner = bandit(target_kl=-1.0, update_epochs=3)
    tuner.ppo = PPOUpdate(
        tuner.config, tuner.actor, tuner.critic, tuner.frozen_base, tuner.generator, gated=True
    )
    plain, calls = tuner.ppo._steps[True].fn, []

    def step(batch):
        calls.append(1)
        if len(calls) % 6 > 2:  # after the first epoch of an iteration
            batch["log_prob"] = batch["log_prob"] * torch.nan
        return plain(batch)

    tuner.ppo._steps[True].fn = step
    for _ in range(2):
        before = [p.clone() for p in tuner.actor.parameters()]
        metrics = tuner.iteration(1)
        assert all(map(math.isfinite, metrics.values())), metrics
        assert tuner.ppo.steps == tuner.config.minibatches
        assert not all(map(torch.equal, before, tuner.actor.parameters()))
    assert len(calls) == 2 * 3 * tuner.config.minibatches
    assert all(p.isfinite().all() for p in tuner.actor.parameters())


def test_an_iteration_reads_its_numbers_once():
    """With the stop on the device nothing waits for it but the metrics, at the end."""
    tuner = bandit(update_epochs=2, bc_coef=0.1, bc_states=16)
    args = tuner.config, tuner.actor, tuner.critic, tuner.frozen_base, tuner.generator
    tuner.ppo = PPOUpdate(*args, gated=True)
    seen = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                seen.append(func)
            return func(*args, **(kwargs or {}))

    with Reads():
        r = tuner.rollout()
        estimates = tuner._returns(r._asdict())
        data = {"feature": r.feature, "chain": r.chain, "log_prob": r.log_prob}
        data |= {k: estimates[k] for k in ("advantage", "returns")}
        tuner.ppo.run({k: t.flatten(0, 1) for k, t in data.items()}, True)
    assert not seen


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


@pytest.mark.gpu
def test_captured_iterations_are_eager_ones():
    """Three graphs go on from the same weights, moments, reward scale and generator; an uneven last
    minibatch has a graph of its own. Evaluation in between sees the weights of the replays."""
    how = {"device": "cuda", "n_dreams": 32, "minibatches": 3, "update_epochs": 2, "bc_coef": 0.1}
    captured, eager = bandit(**how), bandit(**how)
    for step in eager.graphs():
        step.enabled = False
    for number in range(8):
        a, b = captured.iteration(number), eager.iteration(number)
        for key, value in a.items():  # sums in another order may lead to another class
            assert value == pytest.approx(b[key], rel=2e-2, abs=2e-2), (number, key)
    assert [step.captured for step in captured.graphs()] == [True] * 4
    assert captured.imagined_success(256) == pytest.approx(eager.imagined_success(256), abs=0.05)
    sampler = captured.actor.freeze()
    torch.testing.assert_close(
        captured.actor._frozen().packed(torch.float32).network.time,
        sampler.packed(torch.float32).network.time,
    )
