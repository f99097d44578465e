"""Diffusion policy: schedule table, network and sampling against a naive statement of section 3."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from diwa.config import PolicyConfig
from diwa.nn import DenoisingMLP, DiffusionPolicy, NoiseSchedule
from diwa.ops.reference_chain import posterior_mean
from diwa.rl.ppo import chunk_log_prob

# beta, alpha_bar, sigma, c1, c2, p, q of section 11.1
TABLE = [
    (0.007993, 0.9920073, 0.000000, 1.000000, 0.000000, 1.004020, 0.089761),
    (0.020075, 0.9720927, 0.075826, 0.716466, 0.283514, 1.014253, 0.169436),
    (0.032254, 0.940739, 0.123244, 0.536620, 0.463264, 1.031016, 0.250986),
    (0.044681, 0.8987059, 0.161679, 0.427831, 0.571820, 1.054851, 0.335725),
    (0.057520, 0.8470122, 0.195152, 0.356428, 0.642781, 1.086564, 0.424995),
    (0.070957, 0.7869105, 0.225707, 0.306464, 0.692011, 1.127294, 0.520377),
    (0.085210, 0.7198575, 0.254588, 0.269821, 0.727518, 1.178628, 0.623830),
    (0.100547, 0.6474782, 0.282670, 0.241994, 0.753672, 1.242760, 0.737871),
    (0.117304, 0.5715267, 0.310661, 0.220293, 0.772979, 1.322762, 0.865852),
    (0.135922, 0.4938436, 0.339207, 0.203013, 0.786893, 1.423001, 1.012390),
    (0.156997, 0.4163116, 0.368976, 0.189019, 0.796193, 1.549854, 1.184081),
    (0.181359, 0.3408096, 0.400733, 0.177516, 0.801156, 1.712948, 1.390751),
    (0.210212, 0.2691675, 0.435436, 0.167917, 0.801583, 1.927475, 1.647774),
    (0.245372, 0.2031215, 0.474378, 0.159751, 0.796695, 2.218820, 1.980697),
    (0.289725, 0.1442721, 0.519423, 0.152591, 0.784819, 2.632745, 2.435436),
    (0.348137, 0.09404561, 0.573443, 0.145960, 0.762619, 3.260849, 3.103730),
    (0.429434, 0.05365923, 0.641176, 0.139161, 0.723122, 4.316957, 4.199538),
    (0.551024, 0.02409172, 0.730978, 0.130793, 0.649756, 6.442673, 6.364592),
    (0.748476, 0.006059645, 0.857261, 0.116883, 0.492423, 12.846252, 12.807271),
    (0.999000, 6.059645e-06, 0.996470, 0.077766, 0.031431, 406.234143, 406.232913),
]
OMEGA = [1, 0.26826958, 0.07196857, 0.01930698, 0.00517947, 0.00138950, 0.00037276, 0.0001]
SINUSOID_5 = [
    *(-0.958924, 0.973792, 0.352127, 0.096385, 0.025894, 0.006947, 0.001864, 0.000500),
    *(0.283662, 0.227440, 0.935952, 0.995344, 0.999665, 0.999976, 0.999998, 1.0),
]
F, L, A, N = 11, 4, 7, 6
CONFIG = PolicyConfig(chunk=L, width=32)


@pytest.fixture
def policy() -> DiffusionPolicy:
    torch.manual_seed(0)
    return DiffusionPolicy(F, CONFIG)


@pytest.fixture
def tuned(policy) -> DiffusionPolicy:
    """A policy that has moved away from `policy`."""
    moved = copy.deepcopy(policy)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return moved


def noise_for(policy, n=N, seed=0):
    return policy.noise(n, torch.Generator().manual_seed(seed))


def test_schedule_table():
    s = NoiseSchedule(20)
    alpha = s.alpha_bar.double() / torch.cat([torch.ones(1), s.alpha_bar[:-1]]).double()
    columns = (1 - alpha, s.alpha_bar, s.sigma, s.c1, s.c2, s.p, s.q)
    for j, column in enumerate(columns):
        expected = torch.tensor([row[j] for row in TABLE], dtype=torch.float64)
        # half a unit of the table's last digit (six decimals or seven digits), beta from float32
        # alpha_bar; 1e-5 relative is ten times tighter than the digits of the paper need
        got = column.double()
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5, msg=f"column {j}")


@pytest.mark.parametrize("steps", [5, 50])
def test_schedule_of_other_lengths_is_a_variance_preserving_chain(steps):
    s = NoiseSchedule(steps)
    assert s.alpha_bar.shape == (steps,) and (s.alpha_bar.diff() < 0).all()
    # x_t = x_0 exactly must stay x_0 in the mean: c1 x0 + c2 sqrt(abar_t) x0 = sqrt(abar_{t-1}) x0
    previous = torch.cat([torch.ones(1), s.alpha_bar[:-1]])
    torch.testing.assert_close(s.c1 + s.c2 * s.alpha_bar.sqrt(), previous.sqrt())


def test_deviations_of_the_two_sampling_modes():
    s = NoiseSchedule(20)
    explore, evaluation = s.sampling_std(0.1), s.evaluation_std()
    assert explore[:2].tolist() == pytest.approx([0.1, 0.1])
    assert explore[2].item() == pytest.approx(0.123244, abs=1e-6)
    assert evaluation[0] == 0 and evaluation[1].item() == pytest.approx(0.075826, abs=1e-6)
    assert s.sigma[0].item() < 1e-9, "evaluation_std must not change the table"


STEPS = [  # t, x_t, eps, mu, std, log density of mu + std / 2 (section 11.2)
    (5, 0.5, 0.1, 0.502795, 0.225707, 0.444577),
    (0, 0.3, -0.2, 0.319158, 0.1, 1.258647),
    (9, -1.2, 0.7, -1.147284, 0.339207, 0.037207),
    (5, 2.0, 0.1, 1.690485, 0.225707, 0.444577),
]


@pytest.mark.parametrize(("t", "x", "eps", "mu", "std", "log_p"), STEPS)
def test_ddpm_step_and_log_density_of_the_test_vectors(policy, t, x, eps, mu, std, log_p):
    policy.net.out.weight.data.zero_()
    policy.net.out.bias.data.fill_(eps)  # predicts the same noise everywhere
    steps = policy.schedule.tables(CONFIG, explore=True)
    mean = posterior_mean(steps, torch.tensor([[x]]), torch.tensor([[eps]]), t)
    torch.testing.assert_close(mean.item(), mu, atol=2e-6, rtol=0)
    # the transition out of x_t is the first of a chain that begins there, Kf = t + 1
    chain = torch.full((1, t + 2, L, A), x)
    chain[:, 1] = mu + 0.5 * std
    log_prob = policy.chain_log_prob(torch.zeros(1, F), chain)
    assert log_prob.shape == (1, t + 1, L, A)
    # mu and std above are rounded to 1e-6; the density's slope there is 0.5 / std <= 5
    torch.testing.assert_close(log_prob[0, 0], torch.full((L, A), log_p), atol=2e-5, rtol=0)


def test_time_embedding():
    table = DenoisingMLP(28, 8, 16).sinusoid
    assert table.shape == (20, 16)
    torch.testing.assert_close(table[5], torch.tensor(SINUSOID_5), atol=1e-6, rtol=0)
    torch.testing.assert_close(table[1, :8].asin(), torch.tensor(OMEGA), atol=1e-6, rtol=1e-5)


def test_parameter_count_at_paper_size():
    """The first layer is split in three with one bias: the count is that of one 2092-wide layer."""
    net = DiffusionPolicy(2048, PolicyConfig(width=512)).net
    time = sum(p.numel() for p in net.time.parameters())
    assert time == 1_072
    assert sum(p.numel() for p in net.parameters()) - time == 1_611_292


def naive_noise(policy: DiffusionPolicy, x, t: int, feature):
    """Section 3.1 for one row: one wide first layer on [chunk, time embedding, feature]."""
    net = policy.net
    omega = [math.exp(-i * math.log(1e4) / 7) for i in range(8)]
    sinusoid = torch.tensor([math.sin(t * w) for w in omega] + [math.cos(t * w) for w in omega])
    embedding = net.time(sinusoid)
    wide = nn.Linear(len(x) + 16 + len(feature), CONFIG.width)
    with torch.no_grad():
        wide.weight.copy_(
            torch.cat([net.chunk_in.weight, net.time_in.weight, net.cond_in.weight], 1)
        )
        wide.bias.copy_(net.cond_in.bias)
    y = wide(torch.cat([x, embedding, feature]))
    mish = nn.functional.mish
    y = y + net.hidden2(mish(net.hidden1(mish(y))))
    return net.out(y)


def naive_chain(policy, base, feature, noise, kf, explore):
    """Section 3.3 for one dream in Python numbers of the table; all K + 1 states."""
    x = noise[0].flatten()
    states = [x]
    for t in range(19, -1, -1):
        beta, bar, sigma = (TABLE[t][j] for j in (0, 1, 2))
        before = TABLE[t - 1][1] if t else 1.0
        eps = naive_noise(policy if t < kf else base, x, t, feature)
        x0 = (x - math.sqrt(1 - bar) * eps) / math.sqrt(bar)
        x0 = x0.clamp(-1, 1)
        mean = beta * math.sqrt(before) / (1 - bar) * x0
        mean = mean + math.sqrt(1 - beta) * (1 - before) / (1 - bar) * x
        std = max(sigma, 0.1) if explore else (max(sigma, 1e-3) if t else 0.0)
        x = mean + std * noise[20 - t].flatten().clamp(-3, 3)
        states.append(x)
    return torch.stack(states)


@pytest.mark.parametrize(("kf", "explore"), [(10, True), (3, True), (20, True), (10, False)])
@torch.no_grad()
def test_sampling_is_the_naive_chain(policy, tuned, kf, explore):
    feature, noise = torch.randn(N, F), noise_for(policy)
    noise[4, 0, 0, 0] = 5.0  # clipped
    out = tuned.sample(feature, noise, base=policy, ft_steps=kf, explore=explore)
    assert out.chain.shape == (N, kf + 1, L, A) and out.log_prob.shape == (N, kf, L, A)
    for n in range(N):
        states = naive_chain(tuned, policy, feature[n], noise[:, n], kf, explore)
        # the table has six decimals, multiplied by up to 406 at t = 19 before the clamp
        torch.testing.assert_close(
            out.chain[n].flatten(1), states[20 - kf :], atol=5e-4, rtol=1e-3, msg=f"dream {n}"
        )
    assert torch.equal(out.chunk, out.chain[:, -1])


@pytest.mark.parametrize("kf", [1, 10, 20])
@torch.no_grad()
def test_log_probs_from_the_noise_are_the_log_probs_of_the_chain(policy, tuned, kf):
    feature, noise = torch.randn(N, F), 1.5 * noise_for(policy)
    out = tuned.sample(feature, noise, base=policy, ft_steps=kf, explore=True)
    computed = tuned.chain_log_prob(feature, out.chain)
    # (x_{t-1} - mu) / std loses digits: 1e-7 / 0.1 in float32, times a noise of at most 3
    torch.testing.assert_close(out.log_prob, computed, atol=3e-5, rtol=1e-5)
    if kf <= 10:  # section 5.6: deviations in [0.1, 0.339] and noise within 3
        assert out.log_prob.min() >= -4.34 and out.log_prob.max() <= 1.39
    ratio = (chunk_log_prob(computed) - chunk_log_prob(out.log_prob)).exp()
    torch.testing.assert_close(ratio, torch.ones(N, kf), atol=1e-5, rtol=0)
    assert not torch.allclose(policy.chain_log_prob(feature, out.chain), computed, atol=1e-3)


@torch.no_grad()
def test_log_probs_with_another_deviation_than_the_sampler(policy):
    policy.config = dataclasses.replace(CONFIG, min_logprob_std=0.25)
    feature = torch.randn(N, F)
    out = policy.sample(feature, noise_for(policy), ft_steps=5, explore=True)
    torch.testing.assert_close(
        out.log_prob, policy.chain_log_prob(feature, out.chain), atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_which_network_runs_when(policy, tuned):
    feature, noise = torch.randn(N, F), noise_for(policy)
    assert torch.equal(
        tuned.sample(feature, noise, base=policy, ft_steps=0).chunk,
        policy.sample(feature, noise).chunk,
    )
    assert torch.equal(
        tuned.sample(feature, noise, base=policy, ft_steps=20).chunk,
        tuned.sample(feature, noise).chunk,
    )
    kept = policy.sample(feature, noise, ft_steps=10).chain[:, 0]
    mixed = tuned.sample(feature, noise, base=policy, ft_steps=10)
    assert torch.equal(mixed.chain[:, 0], kept), "the frozen steps belong to the base policy"
    assert not torch.allclose(mixed.chunk, policy.sample(feature, noise).chunk)
    assert policy.sample(feature, noise).log_prob.shape == (N, 0, L, A)


@torch.no_grad()
def test_evaluation_adds_no_noise_at_the_last_step(policy):
    feature, noise = torch.randn(N, F), noise_for(policy)
    chunk = policy.sample(feature, noise).chunk
    assert chunk.abs().max() <= 1
    other = noise.clone()
    other[20] = 0
    assert torch.equal(policy.sample(feature, other).chunk, chunk)
    explored = policy.sample(feature, noise, explore=True)
    quiet = policy.sample(feature, other, explore=True)
    torch.testing.assert_close(
        explored.chunk - quiet.chunk, 0.1 * noise[20].clamp(-3, 3), atol=1e-6, rtol=0
    )


def test_gradient_of_the_log_prob_reaches_the_network_only_where_not_clamped(policy):
    feature, noise = torch.randn(N, F), noise_for(policy)
    chain = policy.sample(feature, noise, ft_steps=10, explore=True).chain
    policy.chain_log_prob(feature, chain).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in policy.parameters())
    policy.zero_grad()
    chain = torch.full((1, 2, L, A), 5.0)  # the clean estimate is clamped at t = 0
    policy.chain_log_prob(feature[:1], chain).sum().backward()
    assert not policy.net.out.weight.grad.any()


def test_bc_loss_is_the_error_of_the_noise(policy):
    torch.manual_seed(1)
    feature, chunk, noise = torch.randn(N, F), torch.rand(N, L, A), torch.randn(N, L, A)
    step = torch.tensor([0, 1, 5, 9, 10, 19])
    rows = []
    for n in range(N):
        bar = TABLE[step[n]][1]
        x = math.sqrt(bar) * chunk[n] + math.sqrt(1 - bar) * noise[n]
        predicted = naive_noise(policy, x.flatten(), int(step[n]), feature[n])
        rows.append((predicted - noise[n].flatten()).square().mean())
    loss = policy.bc_loss(feature, chunk, step, noise)
    torch.testing.assert_close(loss, torch.stack(rows).mean(), atol=1e-5, rtol=1e-5)


def test_cloning_one_chunk_reproduces_it():
    torch.manual_seed(0)
    policy = DiffusionPolicy(F, dataclasses.replace(CONFIG, width=128))
    feature, chunk = torch.randn(1, F), torch.linspace(-0.9, 0.9, L * A).view(1, L, A)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1000)
    for _ in range(1000):
        step = torch.randint(20, (64,), generator=generator)
        noise = torch.randn(64, L, A, generator=generator)
        loss = policy.bc_loss(feature.expand(64, -1), chunk.expand(64, -1, -1), step, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    sampled = policy.sample(feature.expand(32, -1), noise_for(policy, 32)).chunk
    # untrained samples are uniform-like in [-1, 1], error near 0.7
    assert (sampled - chunk).abs().mean() < 0.05
    assert (sampled - chunk).abs().max() < 0.2
