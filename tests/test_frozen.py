"""FrozenPolicy, the kinds of network and of sampler, precision of log-probs, and the wiring."""

import copy
import dataclasses
import doctest
import math
import pickle

import pytest
import torch
from test_ppo import bandit

import diwa.nn.diffusion
import diwa.nn.frozen as frozen_module
from diwa.agent import Agent
from diwa.config import PolicyConfig
from diwa.nn import DenoisingMLP, DiffusionPolicy, NoiseSchedule
from diwa.nn.frozen import frozen_dtype
from diwa.nn.rssm import RSSMState
from diwa.ops import use_backend
from diwa.rl.ppo import chunk_log_prob, clip_schedule

H, S, C, N, KF = 24, 4, 5, 50, 10
F = H + S * C
CONFIG = PolicyConfig(width=64)
OTHERS = [
    PolicyConfig(width=40, network="plain", hidden_layers=3, chunk=3),
    PolicyConfig(width=40, hidden_layers=4, denoising_steps=12),
    PolicyConfig(width=33, ddim_steps=10, ddim_eta=0.5),
]


def moved(policy, by=0.05):
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(by * torch.randn_like(p))
    return other


def setting(config=CONFIG, n=N):
    """base, tuned, h, z_idx, feature, noise"""
    base = DiffusionPolicy(F, config)
    h, z = torch.randn(n, H), torch.randint(C, (n, S))
    feature = torch.cat([h, torch.nn.functional.one_hot(z, C).flatten(1).float()], 1)
    return base, moved(base), h, z, feature, base.noise(n, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [CONFIG, *OTHERS], ids=str)
@pytest.mark.parametrize("explore", [True, False])
def test_fused_chain_is_the_reference_chain(config, explore):
    base, tuned, h, z, feature, noise = setting(config)
    kwargs = {"ft_steps": min(KF, tuned.schedule.steps), "explore": explore}
    right = tuned.sample(feature, noise, base=base, **kwargs, backend="reference")
    frozen = tuned.freeze(), base.freeze()
    results = [
        tuned.sample(feature, noise, base=base, **kwargs),
        frozen[0].sample(feature, noise, base=frozen[1], **kwargs),
        frozen[0].sample((h, z), noise, base=frozen[1], **kwargs),
    ]
    for actual in results:
        for a, b in zip(actual, right, strict=True):
            # the first step amplifies rounding of the noise by up to 406, before the clamp
            torch.testing.assert_close(a, b, rtol=0, atol=5e-5)
        assert (actual.chain - right.chain).square().mean().sqrt() < 1e-5


def test_forced_reference_takes_the_eager_path():
    base, tuned, _, _, feature, noise = setting()
    with use_backend("reference"):
        eager = tuned.sample(feature, noise, base=base, ft_steps=KF)
    right = tuned.sample(feature, noise, base=base, ft_steps=KF, backend="reference")
    assert torch.equal(eager.chain, right.chain)


def change_in_place(policy):
    with torch.no_grad():
        policy.net.hidden1.weight.mul_(1.5)


def change_by_optimiser(policy):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def change_by_loading(policy):
    policy.load_state_dict(moved(policy).state_dict())


def change_by_replacing(policy):
    policy.net.out.weight = torch.nn.Parameter(policy.net.out.weight * 2)


def change_of_time(policy):
    with torch.no_grad():
        policy.net.time[2].bias.add_(1)


CHANGES = [
    change_in_place,
    change_by_optimiser,
    change_by_loading,
    change_by_replacing,
    change_of_time,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_weight_is_packed_again(change, dtype):
    base, _, h, z, _, noise = setting()
    frozen = base.freeze(dtype)
    before = frozen.sample((h, z), noise, explore=True).chunk
    packed = frozen.packed(dtype)
    assert torch.equal(frozen.sample((h, z), noise, explore=True).chunk, before)
    assert frozen.packed(dtype) is packed, "packed again without need"
    change(base)
    after = frozen.sample((h, z), noise, explore=True).chunk
    assert not torch.equal(after, before)
    assert torch.equal(after, base.freeze(dtype).sample((h, z), noise, explore=True).chunk)


def test_a_change_under_inference_mode_is_noticed():
    with torch.inference_mode():
        policy = DiffusionPolicy(F, CONFIG)
        frozen, noise = policy.freeze(), torch.randn(21, 2, 4, 7)
        before = frozen.sample(torch.ones(2, F), noise).chunk
        policy.net.out.bias.add_(1)
        assert not torch.equal(frozen.sample(torch.ones(2, F), noise).chunk, before)


def test_refresh_after_a_change_that_torch_does_not_count():
    base, _, h, z, _, noise = setting()
    frozen = base.freeze()
    before = frozen.sample((h, z), noise, explore=True).chunk
    base.net.out.bias.data += 1
    frozen.refresh()
    assert not torch.equal(frozen.sample((h, z), noise, explore=True).chunk, before)


def test_copies_do_not_share_what_is_packed():
    base, _, _, _, feature, noise = setting()
    right = base.sample(feature, noise).chunk
    for twin in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert torch.equal(twin.sample(feature, noise).chunk, right)
        change_in_place(twin)
        assert not torch.equal(twin.sample(feature, noise).chunk, right)
    assert torch.equal(base.sample(feature, noise).chunk, right)
    wide = copy.deepcopy(base).double()
    chunk = wide.sample(feature.double(), noise.double()).chunk
    # the first step amplifies rounding of the noise by up to 406, before the clamp
    torch.testing.assert_close(chunk.float(), right, rtol=0, atol=5e-5)


def test_freeze_refuses_other_dtypes():
    with pytest.raises(TypeError, match="float32 or bfloat16, got torch.float16"):
        DiffusionPolicy(F, CONFIG).freeze(torch.float16)


def ratio_error(tuned, feature, chain):
    """|PPO ratio - 1| before the first update, `[N, Kf]`."""
    new = chunk_log_prob(tuned.chain_log_prob(feature, chain.chain))
    return ((new - chunk_log_prob(chain.log_prob)).exp() - 1).abs()


@torch.no_grad()
def test_ratio_is_one_before_the_first_update():
    """Tuned steps in float32, frozen steps in either precision: the ratio is 1 to a hundredth of
    the narrowest clip range. With bfloat16 tuned steps it strays by the width of that range."""
    config = dataclasses.replace(CONFIG, width=256)
    base, tuned, h, z, feature, noise = setting(config)
    narrowest = clip_schedule(KF, 0.01, 0.001, 3.0).min()
    kwargs = {"ft_steps": KF, "explore": True}
    for frozen in (base.freeze(), base.freeze(torch.bfloat16)):
        chain = tuned.freeze().sample((h, z), noise, base=frozen, **kwargs)
        assert ratio_error(tuned, feature, chain).max() < 0.02 * narrowest
    mixed = tuned.freeze(torch.float32, frozen_dtype=torch.bfloat16)
    chain = mixed.sample((h, z), noise, **kwargs)
    assert ratio_error(tuned, feature, chain).max() < 0.02 * narrowest
    chain = tuned.freeze(torch.bfloat16).sample((h, z), noise, base=base.freeze(), **kwargs)
    error = ratio_error(tuned, feature, chain)
    assert error.max() > narrowest / 2, "bfloat16 log-probs would do in the update"


@torch.no_grad()
def test_mixed_precision_touches_only_the_steps_it_should():
    base, tuned, h, z, _, noise = setting()
    exact = tuned.freeze().sample((h, z), noise, base=base.freeze(), ft_steps=KF)
    mixed = tuned.freeze().sample((h, z), noise, base=base.freeze(torch.bfloat16), ft_steps=KF)
    assert not torch.equal(mixed.chain, exact.chain)
    assert (mixed.chunk - exact.chunk).abs().max() < 0.1
    half = tuned.freeze(torch.bfloat16).sample((h, z), noise, base=base.freeze(), ft_steps=KF)
    assert torch.equal(half.chain[:, 0], exact.chain[:, 0])


@torch.no_grad()
def test_fine_tuning_and_the_agent_sample_through_the_fused_path():
    """Rollouts and evaluation, fused and on the reference, from the same noise."""
    chunks, chains = [], []
    for backend in ("auto", "reference"):
        with use_backend(backend):
            tuner = bandit()
            tuner.actor.net.out.bias.add_(0.1)
            r = tuner.rollout()
            chains.append(r.chain[0])
            new = chunk_log_prob(tuner.actor.chain_log_prob(r.feature[0], r.chain[0]))
            torch.testing.assert_close(
                (new - r.log_prob[0]).exp(), torch.ones_like(new), rtol=0, atol=1e-5
            )
            agent = Agent(tuner.world_model, tuner.actor, tuner.base, KF)
            noise = tuner.actor.noise(128, torch.Generator().manual_seed(1))
            state = RSSMState(*(torch.ones_like(t) for t in tuner.dream.state))
            chunks.append(agent.act(state, noise))
    torch.testing.assert_close(*chains, rtol=0, atol=1e-5)
    torch.testing.assert_close(*chunks, rtol=0, atol=1e-5)


@pytest.mark.parametrize("frozen_dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_ratio_of_a_rollout_is_one(frozen_dtype):
    tuner = bandit(frozen_dtype=frozen_dtype)
    r = tuner.rollout()
    feature, chain, old = (x.flatten(0, 1) for x in (r.feature, r.chain, r.log_prob))
    new = chunk_log_prob(tuner.actor.chain_log_prob(feature, chain))
    torch.testing.assert_close((new - old).exp(), torch.ones_like(old), atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_layer_at_the_address_of_the_one_it_replaces_is_noticed():
    """The allocator gives freed memory out again, and a new parameter begins with version 0."""
    policy = DiffusionPolicy(F, CONFIG).requires_grad_(False)
    frozen, feature = policy.freeze(), torch.randn(2, F)
    noise = policy.noise(2, torch.Generator().manual_seed(0))
    for _ in range(20):
        frozen.sample(feature, noise)
        rows, columns = policy.net.time_in.weight.shape
        policy.net.time_in = None  # its weights are freed, unless somebody holds them
        policy.net.time_in = torch.nn.Linear(columns, rows, bias=False)
        torch.nn.init.normal_(policy.net.time_in.weight, std=2.0)
        right = policy.freeze().sample(feature, noise)
        assert torch.equal(frozen.sample(feature, noise).chunk, right.chunk)


def test_state_dict_of_the_default_network_is_unchanged():
    keys = ["chunk_in.weight", "time_in.weight", "cond_in.weight", "cond_in.bias"]
    keys += [f"{m}.{p}" for m in ("hidden1", "hidden2", "out") for p in ("weight", "bias")]
    keys += [f"time.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")]
    assert set(DiffusionPolicy(F, CONFIG).state_dict()) == {f"net.{k}" for k in keys}


@torch.no_grad()
def test_plain_mlp_is_dppo_s():
    net = DenoisingMLP(28, F, 16, 20, hidden_layers=2, residual=False)
    x, feature, t = torch.randn(3, 28), torch.randn(3, F), torch.tensor([0, 5, 19])
    wide = torch.cat([net.chunk_in.weight, net.time_in.weight, net.cond_in.weight], 1)
    y = torch.cat([x, net.time(net.sinusoid[t]), feature], 1) @ wide.t() + net.cond_in.bias
    for layer in (net.hidden1, net.hidden2, net.out):
        y = layer(torch.nn.functional.mish(y))
    out = net(x, net.time_table()[t], net.cond_in(feature))
    torch.testing.assert_close(out, y, rtol=1e-5, atol=1e-5)  # sums in another order


def test_docstring_of_the_module():
    result = doctest.testmod(diwa.nn.diffusion)
    assert result.attempted and not result.failed


def test_odd_residual_network_is_refused():
    with pytest.raises(ValueError, match="pairs of layers, got 3"):
        DenoisingMLP(28, F, 16, hidden_layers=3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_tables(eta):
    """Section 3.3 and the DDIM paper: x' = sqrt(a') x0 + sqrt(1 - a' - sigma²) eps."""
    s, full = NoiseSchedule(20, ddim_steps=10, ddim_eta=eta), NoiseSchedule(20)
    assert s.time.tolist() == list(range(0, 20, 2)) and s.steps == 10
    for i in range(10):
        a = full.alpha_bar[2 * i].double().item()
        b = full.alpha_bar[2 * i - 2].double().item() if i else 1.0
        sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        x0, eps = 0.4, -0.7
        x = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
        mean = math.sqrt(b) * x0 + math.sqrt(max(1 - b - sigma**2, 0)) * eps
        assert s.c1[i].item() * x0 + s.c2[i].item() * x == pytest.approx(mean, abs=1e-6)
        assert s.sigma[i].item() == pytest.approx(sigma, abs=1e-6)
    quiet = s.tables(CONFIG, explore=False)
    assert not quiet.std.any()
    assert torch.equal(quiet.c2, NoiseSchedule(20, ddim_steps=10, ddim_eta=0.0).c2)
    with pytest.raises(ValueError, match=r"ddim_steps must lie in \[0, 20\]"):
        NoiseSchedule(20, ddim_steps=21)


def test_ddim_with_all_steps_and_full_noise_is_ddpm():
    """eta = 1 gives DDPM's posterior."""
    ddim, ddpm = NoiseSchedule(20, ddim_steps=20), NoiseSchedule(20)
    for name in ("sigma", "c1", "c2", "p", "q"):
        torch.testing.assert_close(getattr(ddim, name), getattr(ddpm, name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("isa, dtype", [("avx2", "float32"), ("avx512_bf16", "bfloat16")])
def test_frozen_steps_are_bfloat16_where_that_is_native(isa, dtype, monkeypatch):
    monkeypatch.setattr(frozen_module, "cpu_isa", lambda: isa)
    assert frozen_dtype("auto", "cpu") == getattr(torch, dtype)
    assert frozen_dtype("auto", "cuda") == frozen_dtype("bfloat16", "cpu") == torch.bfloat16
    assert frozen_dtype("float32", "cuda") == torch.float32
