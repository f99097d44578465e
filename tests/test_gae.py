"""GAE: both vectors of section 11.4, brute force; reward scale: vector and carried state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diwa.rl.gae import RewardScaler, gae

GAMMA, LAMBDA = 0.999, 0.95
R, V = [0.0, 1, 0, 0], [0.2, 0.5, 0.1, 0.3]


def column(values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


@pytest.mark.parametrize(
    ("following", "done", "advantage", "returns"),
    [
        # reference form: nothing is truncated, successors are the next rows
        ([0.5, 0, 0.3, 0.4], [0, 1, 0, 0], [0.774025, 0.5, 0.294225, 0.0996],
         [0.974025, 1, 0.394225, 0.3996]),
        # fixed form: step 2 is truncated with a successor of its own
        ([0.5, 0, 0.6, 0.4], [0, 1, 1, 0], [0.774025, 0.5, 0.4994, 0.0996],
         [0.974025, 1, 0.5994, 0.3996]),
    ],
)  # fmt: skip
def test_vectors(following, done, advantage, returns):
    a, ret = gae(*map(column, (R, V, following)), column([0, 1, 0, 0]), column(done), GAMMA, LAMBDA)
    # six decimals
    torch.testing.assert_close(a, column(advantage), atol=1e-6, rtol=0)
    torch.testing.assert_close(ret, column(returns), atol=1e-6, rtol=0)


def test_the_value_beyond_success_is_never_used():
    """Garbage in the successor of a terminated step must not leak."""
    args = column(R), column(V)
    flags = column([0, 1, 0, 0]), column([0, 1, 0, 1])
    a, _ = gae(*args, column([0.5, 1e6, 0.3, 0.4]), *flags, GAMMA, LAMBDA)
    b, _ = gae(*args, column([0.5, -7.0, 0.3, 0.4]), *flags, GAMMA, LAMBDA)
    assert torch.equal(a, b)


def brute_force(r, v, following, terminated, done, gamma, lam):
    """A_t = sum_k (gamma lambda)^k delta_{t+k} up to and including the end of the episode."""
    out = []
    for t in range(len(r)):
        total = 0.0
        for k in range(t, len(r)):
            bootstrap = 0.0 if terminated[k] else gamma * following[k]
            total += (gamma * lam) ** (k - t) * (r[k] + bootstrap - v[k])
            if done[k]:
                break
        out.append(total)
    return out


step = st.tuples(*[st.floats(-3, 3)] * 3, st.sampled_from(["go", "go", "success", "cut"]))


@settings(max_examples=80, deadline=None)
@given(st.lists(step, min_size=1, max_size=12), st.floats(0.5, 1), st.floats(0, 1))
def test_brute_force(steps, gamma, lam):
    r, v, following = (list(x) for x in list(zip(*steps, strict=True))[:3])
    ends = [s[3] for s in steps]
    terminated = [float(e == "success") for e in ends]
    done = [float(e != "go") for e in ends]
    a, ret = gae(*map(column, (r, v, following, terminated, done)), gamma, lam)
    expected = brute_force(r, v, following, terminated, done, gamma, lam)
    torch.testing.assert_close(a, column(expected), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(ret, a + column(v))


def test_dreams_do_not_mix():
    torch.manual_seed(0)
    args = [torch.randn(6, 3), torch.randn(6, 3), torch.randn(6, 3)]
    terminated = (torch.rand(6, 3) < 0.2).float()
    done = torch.maximum(terminated, (torch.rand(6, 3) < 0.2).float())
    together, _ = gae(*args, terminated, done, GAMMA, LAMBDA)
    for n in range(3):
        alone, _ = gae(
            *(a[:, n : n + 1] for a in (*args, terminated, done)), gamma=GAMMA, gae_lambda=LAMBDA
        )
        torch.testing.assert_close(together[:, n : n + 1], alone)


REWARD = torch.tensor([[0.0, 1, 0], [0, 0, 1]]).T
FIRST = torch.tensor([[1.0, 0, 1], [1, 0, 0]]).T


def test_reward_scale_of_the_test_vector():
    scaler = RewardScaler(2)
    scaled = scaler(REWARD, FIRST)
    mean, var, count = scaler.moments.tolist()
    assert mean == pytest.approx(0.333327778, abs=1e-9)
    assert var == pytest.approx(0.266683555, abs=1e-9)
    assert count == pytest.approx(6.0001)
    torch.testing.assert_close(scaled, REWARD * 1.936430, atol=1e-6, rtol=0)
    assert scaler.ret.tolist() == [0, 1]


def plain_scaler(calls):
    """Section 5.5 in Python numbers over several calls; the scaled rewards of the last one."""
    ret = [0.0] * calls[0][0].shape[1]
    mean, var, n = 0.0, 1.0, 1e-4
    for reward, first in calls:
        values = []
        for t in range(len(reward)):
            ret = [
                reward[t, i].item() + (1 - first[t, i].item()) * 0.99 * ret[i]
                for i in range(len(ret))
            ]
            values += ret
        m = len(values)
        batch = sum(values) / m
        batch_var = sum((x - batch) ** 2 for x in values) / m
        delta = batch - mean
        second = var * n + batch_var * m + delta**2 * n * m / (n + m)
        mean, var, n = mean + delta * m / (n + m), second / (n + m - 1), n + m
    return calls[-1][0] / (var + 1e-8) ** 0.5


def test_reward_scale_carries_its_state_over_calls_and_checkpoints():
    torch.manual_seed(0)
    calls = []
    for i in range(3):
        first = (torch.rand(5, 4) < 0.3).float()
        if i == 0:
            first[0] = 1
        calls.append(((torch.rand(5, 4) < 0.4).float(), first))
    scaler = RewardScaler(4)
    for reward, first in calls[:2]:
        scaler(reward, first)
    resumed = RewardScaler(4)
    resumed.load_state_dict(scaler.state_dict())
    expected = plain_scaler(calls)
    torch.testing.assert_close(scaler(*calls[2]), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(resumed(*calls[2]), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(RewardScaler(4)(*calls[2]), expected)


def test_scaled_rewards_are_clipped():
    """One reward in 1000 zero steps: without the clip it would be scaled to more than 10."""
    reward = torch.zeros(1000, 1)
    reward[-1] = 1
    first = torch.ones(1000, 1)
    assert RewardScaler(1)(reward, first)[-1].item() == 10
    assert RewardScaler(1, clip=50.0)(reward, first)[-1].item() > 25
