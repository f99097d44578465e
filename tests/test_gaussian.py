"""The Gaussian policy: densities, cloning, PPO, checkpoints, and all phases of a run with it."""

import copy
import dataclasses

import pytest
import torch
from slider_runs import CONFIG, LIMIT
from test_phases import STEPS, prepare

from diwa.agent import Agent, load_policy, make_policy, save_policy
from diwa.checkpoint import read_meta
from diwa.config import PolicyConfig
from diwa.convert import export_checkpoint
from diwa.errors import CheckpointError
from diwa.nn.diffusion import DiffusionPolicy
from diwa.nn.gaussian import GaussianPolicy
from diwa.nn.world_model import WorldModel
from diwa.phases import evaluate
from diwa.rl.ppo import chunk_log_prob, clip_schedule, denoising_discount, ppo_loss

F, L, A, N = 11, 4, 7, 6
GAUSSIAN = PolicyConfig(kind="gaussian", chunk=L, width=32)


@pytest.fixture
def policy() -> GaussianPolicy:
    torch.manual_seed(0)
    return GaussianPolicy(F, GAUSSIAN)


@pytest.mark.parametrize(("network", "layers"), [("residual", 2), ("residual", 4), ("plain", 3)])
def test_log_probs_are_those_of_the_distribution_and_of_its_noise(network, layers):
    torch.manual_seed(0)
    config = dataclasses.replace(GAUSSIAN, network=network, hidden_layers=layers)
    policy = GaussianPolicy(F, config)
    feature, noise = torch.randn(N, F), policy.noise(N, torch.Generator().manual_seed(1))
    assert noise.shape == (2, N, L, A)
    chain = policy.sample(feature, noise, ft_steps=1, explore=True)
    assert chain.chunk.shape == (N, L, A) and chain.chain.shape == (N, 2, L, A)
    assert chain.log_prob.shape == (N, 1, L, A) and torch.equal(chain.chain[:, 1], chain.chunk)
    mean = policy(feature).view(N, L, A)
    wanted = torch.distributions.Normal(mean, GAUSSIAN.min_logprob_std).log_prob(chain.chunk)
    got = policy.chain_log_prob(feature, chain.chain)
    torch.testing.assert_close(got[:, 0], wanted, rtol=1e-5, atol=1e-4)
    # (x - mean) / 0.1 cancels digits: 1e-7 / 0.1 times up to 3 deviations
    torch.testing.assert_close(got, chain.log_prob, rtol=1e-5, atol=1e-4)
    for got_p, want_p in zip(
        torch.autograd.grad(got.sum(), list(policy.parameters())),
        torch.autograd.grad(wanted.sum(), list(policy.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(got_p, want_p, rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="needs pairs of layers, got 3"):
        GaussianPolicy(F, dataclasses.replace(GAUSSIAN, hidden_layers=3))


def test_several_chunks_of_one_state(policy):
    feature, chunks = torch.randn(N, F), torch.randn(N, 3, L, A)
    step = torch.zeros(3, dtype=torch.int64)
    got = policy.transition_log_prob(feature, torch.randn_like(chunks), chunks, step)
    for g in range(3):
        pair = chunks[:, g : g + 1].repeat(1, 2, 1, 1)
        torch.testing.assert_close(got[:, g : g + 1], policy.chain_log_prob(feature, pair))


def test_evaluation_is_the_mean_and_noise_is_clipped(policy):
    feature, noise = torch.randn(N, F), 9 * torch.ones(2, N, L, A)
    mean = policy(feature).view(N, L, A)
    assert torch.equal(policy.sample(feature, noise, ft_steps=1).chunk, mean)
    explored = policy.sample(feature, noise, ft_steps=1, explore=True).chunk
    torch.testing.assert_close(explored, mean + 0.1 * 3)
    assert policy.sample(feature, noise).chain.shape == (N, 0, L, A)
    h, z_idx = torch.randn(N, 3), torch.randint(4, (N, 2))
    dense = torch.cat([h, torch.nn.functional.one_hot(z_idx, 4).flatten(1)], 1)
    assert torch.equal(policy.sample((h, z_idx), noise).chunk, policy.sample(dense, noise).chunk)
    for wrong in ({"ft_steps": 2}, {"noise": noise[:1]}):
        with pytest.raises(ValueError, match="has one step: noise"):
            policy.sample(feature, **{"noise": noise, **wrong})


def test_the_base_acts_only_where_nothing_is_finetuned(policy):
    other, noise = copy.deepcopy(policy), torch.zeros(2, N, L, A)
    with torch.no_grad():
        other.out.bias.add_(1)
    feature = torch.randn(N, F)
    base, tuned = policy.sample(feature, noise).chunk, other.sample(feature, noise).chunk
    assert not torch.equal(base, tuned)
    assert torch.equal(other.sample(feature, noise, base=policy).chunk, base)
    assert torch.equal(other.sample(feature, noise, base=policy, ft_steps=1).chunk, tuned)
    assert torch.equal(other.freeze().sample(feature, noise).chunk, tuned)
    assert other.freeze(torch.float32, torch.bfloat16).policy is other


def test_cloning_finds_the_mean_of_the_demonstrations(policy):
    torch.manual_seed(1)
    feature = torch.randn(64, F)
    chunk = torch.stack([0.5 * feature[:, :A].tanh()] * L, 1)
    chunk[..., 6] = feature[:, :1].sign()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    unused = torch.zeros(64, dtype=torch.int64), torch.zeros_like(chunk)
    first = policy.bc_loss(feature, chunk, *unused).item()
    for _ in range(300):
        optimizer.zero_grad()
        loss = policy.bc_loss(feature, chunk, *unused)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02 * first
    # With the deviation constant, likelihood and squared error have the same gradient up to scale.
    density = policy.chain_log_prob(feature, torch.stack([chunk, chunk], 1))
    nll = torch.autograd.grad(-density.mean(), policy.out.weight)[0]
    mse = torch.autograd.grad(policy.bc_loss(feature, chunk, *unused), policy.out.weight)[0]
    torch.testing.assert_close(nll, mse / (2 * 0.1**2), rtol=1e-3, atol=1e-4)


def test_ppo_moves_the_mean_towards_reward(policy):
    """A bandit that rewards the sum of the chunk: 30 updates, fresh samples each."""
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(128, F, generator=generator)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    discount, clip = denoising_discount(1, 0.99), clip_schedule(1, 0.04, 0.004, 3.0)
    assert discount.tolist() == [1.0] and clip.tolist() == [pytest.approx(0.04)]
    before = policy(feature).mean().item()
    for _ in range(30):
        sampled = policy.sample(feature, policy.noise(128, generator), ft_steps=1, explore=True)
        reward, old = sampled.chunk.sum((1, 2)), chunk_log_prob(sampled.log_prob)
        for _ in range(3):
            new = chunk_log_prob(policy.chain_log_prob(feature, sampled.chain))
            optimizer.zero_grad()
            ppo_loss(new, old, reward, discount, clip).policy_loss.backward()
            optimizer.step()
    assert policy(feature).mean().item() > before + 0.1  # one deviation of the exploration


def test_checkpoints_know_their_kind(policy, tmp_path):
    save_policy(tmp_path / "gaussian", policy, 1)
    assert read_meta(tmp_path / "gaussian")["config"]["kind"] == "gaussian"
    loaded, ft_steps = load_policy(tmp_path / "gaussian")
    assert isinstance(loaded, GaussianPolicy) and ft_steps == 1
    feature = torch.randn(N, F)
    assert torch.equal(loaded(feature), policy(feature))
    save_policy(tmp_path / "diffusion", make_policy(F, PolicyConfig(width=8)))
    assert isinstance(load_policy(tmp_path / "diffusion")[0], DiffusionPolicy)
    with pytest.raises(CheckpointError, match="holds a Gaussian policy"):
        export_checkpoint(tmp_path / "gaussian", tmp_path / "out.pt")


def test_all_phases_of_a_run(tmp_path):
    pytest.importorskip("gymnasium", reason="the phases import the simulator")
    pytest.importorskip("pybullet", reason="the phases import the simulator")
    kind = dataclasses.replace(CONFIG.policy, kind="gaussian")
    config = dataclasses.replace(CONFIG, task="move_slider_left", policy=kind)
    run = prepare(tmp_path / "run", config)
    for phase, _, _ in STEPS.values():
        phase(config, run)
    (base, none), (tuned, ft_steps) = (load_policy(run.dir(p)) for p in ("pretrain", "finetune"))
    assert isinstance(base, GaussianPolicy) and isinstance(tuned, GaussianPolicy)
    assert (none, ft_steps) == (0, 1)
    assert any(
        not torch.equal(a, b) for a, b in zip(base.parameters(), tuned.parameters(), strict=True)
    )
    rows = run.metrics("finetune")
    assert all("ppo/approx_kl" in row for row in rows) and "ppo/bc_loss" in rows[-1]
    losses = [row["policy/bc_loss"] for row in run.metrics("pretrain")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("policy_config", [GAUSSIAN, PolicyConfig(width=16, ddim_steps=5)])
def test_episodes_draw_as_much_noise_as_the_policy_has_steps(policy_config):
    torch.manual_seed(0)
    model = WorldModel(CONFIG.world_model).requires_grad_(False)
    policy = make_policy(model.feature_dim, policy_config).requires_grad_(False)
    group = evaluate.Slots(Agent(model, policy), 2, LIMIT, seed=0)
    group.begin(0, 0)
    group.begin(1, 1)
    action = group.act(torch.zeros(2, 15), torch.zeros(2, 24))
    assert group.noise.shape[2] == policy.steps + 1
    assert action.shape == (2, 7)
