"""onehot_st, balanced_kl and gae: input checks, precision, empty batches, NaN, torch.compile.

Their values are tested where they are used: test_rssm.py and test_gae.py.
"""

import pytest
import torch

from diwa.ops import balanced_kl, gae, onehot_st

T, N, S, C = 4, 3, 2, 5
ADVANTAGE = ("reward", "value", "next_value", "terminated", "done")


def columns(dtype=torch.float32):
    flags = [(torch.rand(T, N) < 0.3).to(dtype) for _ in range(2)]
    return [torch.randn(T, N, dtype=dtype) for _ in range(3)] + flags


def test_dtypes():
    logits, uniform = torch.randn(N, S, C), torch.rand(N, S)
    assert onehot_st(logits, uniform).dtype == torch.float32
    assert onehot_st(logits.bfloat16(), uniform).dtype == torch.float32
    assert onehot_st(logits.double(), uniform.double()).dtype == torch.float64
    assert gae(*columns(torch.float64), 0.9, 0.9)[0].dtype == torch.float64


def test_gradients_in_float64():
    logits = torch.randn(N, S, C, dtype=torch.double, requires_grad=True)
    weight = torch.randn(N, S * C, dtype=torch.double)
    (onehot_st(logits, torch.rand(N, S), unimix=0.2) * weight).sum().backward()
    straight = logits.detach().requires_grad_()
    (0.8 * straight.softmax(-1).flatten(1) * weight).sum().backward()
    torch.testing.assert_close(logits.grad, straight.grad, rtol=1e-12, atol=1e-14)
    prior = torch.randn(N, S, C, dtype=torch.double, requires_grad=True)
    post = torch.randn(N, S, C, dtype=torch.double)
    assert torch.autograd.gradcheck(lambda p: balanced_kl(post, p, 1.0)[0], prior)


def test_empty_and_nan():
    assert onehot_st(torch.zeros(0, S, C), torch.zeros(0, S)).shape == (0, S * C)
    assert balanced_kl(torch.zeros(0, S, C), torch.zeros(0, S, C), 0.8)[0].shape == (0,)
    for shape in ((0, N), (T, 0)):
        advantage, returns = gae(*[torch.zeros(shape)] * 5, 0.9, 0.9)
        assert advantage.shape == returns.shape == shape
    logits = torch.zeros(N, S, C)
    logits[1, 0, 2] = torch.nan
    z = onehot_st(logits, torch.rand(N, S)).unflatten(-1, (S, C))
    assert z[1, 0].isnan().all() and z.isnan().sum() == C
    assert balanced_kl(logits, torch.zeros(N, S, C), 0.8)[0].isnan().tolist() == [
        False,
        True,
        False,
    ]
    given = columns()
    given[3].zero_(), given[4].zero_()
    given[0][2, 1] = torch.nan
    assert gae(*given, 0.9, 0.9)[0].isnan().nonzero().tolist() == [[0, 1], [1, 1], [2, 1]]


def test_compile_in_one_graph():
    logits, uniform, given = torch.randn(N, S, C), torch.rand(N, S), columns()
    torch._dynamo.reset()

    def both(logits, uniform, *given):
        z = onehot_st(logits, uniform)
        return z, *balanced_kl(logits, logits.flip(0), 0.8), *gae(*given, 0.9, 0.95)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(both(logits, uniform, *given), compiled(logits, uniform, *given), strict=True):
        assert torch.equal(a, b)


def test_bad_arguments_are_named():
    logits, uniform = torch.randn(N, S, C), torch.rand(N, S)
    with pytest.raises(ValueError, match="onehot_st: logits must be"):
        onehot_st(logits[0, 0], uniform[0, 0])
    with pytest.raises(ValueError, match="onehot_st: uniform must be"):
        onehot_st(logits, uniform.T)
    with pytest.raises(TypeError, match="onehot_st: logits must be floating"):
        onehot_st(logits.long(), uniform)
    with pytest.raises(ValueError, match="balanced_kl: prior must be"):
        balanced_kl(logits, logits[1:], 0.8)
    with pytest.raises(ValueError, match="balanced_kl: post must be"):
        balanced_kl(logits[0, 0], logits[0, 0], 0.8)
    with pytest.raises(TypeError, match="balanced_kl: logits must be floating"):
        balanced_kl(logits, logits.long(), 0.8)
    for i, name in enumerate(ADVANTAGE[1:], 1):
        given = columns()
        given[i] = given[i][:, 1:]
        with pytest.raises(ValueError, match=f"gae: {name} must be"):
            gae(*given, 0.9, 0.9)
        given = columns()
        given[i] = given[i].bool()
        with pytest.raises(TypeError, match=f"gae: {name} must be floating"):
            gae(*given, 0.9, 0.9)
    with pytest.raises(ValueError, match="gae: reward must be"):
        gae(*[torch.tensor(1.0)] * 5, 0.9, 0.9)
