"""Triton variants of onehot_st, balanced_kl and gae against their specification."""

import pytest
import torch
from optest import HALVES, assert_accurate, variants

import diwa.ops
from diwa.ops import reference_rssm, rssm_imagine_gpu, rssm_triton

TRITON = [case for case in variants(*HALVES) if case.id.startswith("triton")]
FLOAT32 = [case for case in variants() if case.id.startswith("triton")]
each_dtype = pytest.mark.parametrize("variant, dtype", TRITON, indirect=["variant"])
triton = pytest.mark.parametrize("variant, dtype", FLOAT32, indirect=["variant"])
SHAPES = [(3, 2, 5), (2, 3, 4, 33), (1, 1, 1)]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("unimix", [0.0, 0.1])
def test_onehot_st(variant, dtype, shape, unimix):
    logits = torch.randn(shape).to(variant.device, dtype)
    uniform = torch.rand(shape[:-1]).to(variant.device)
    grad = torch.randn(*shape[:-2], shape[-2] * shape[-1]).to(variant.device)
    gradients = []
    for op, x in (
        (rssm_triton.onehot_st, logits),
        (reference_rssm.onehot_st, logits),
        (reference_rssm.onehot_st, logits.double()),
    ):
        leaf = x.clone().requires_grad_()
        mix = {"unimix": unimix}
        z = op(leaf, uniform, **mix)
        assert z.shape == grad.shape
        hot = z.unflatten(-1, shape[-2:]).argmax(-1)
        gradients.append((hot, torch.autograd.grad(z, leaf, grad.to(z.dtype))[0]))
    (hot, g), (eager_hot, eager), (_, right) = gradients
    assert torch.equal(hot, eager_hot)
    assert_accurate("grad", g, eager, right)


@triton
def test_onehot_is_exact_and_nan_stays(variant, dtype):
    logits = torch.randn(4, 2, 5, device=variant.device)
    uniform = torch.rand(4, 2, device=variant.device)
    z = rssm_triton.onehot_st(logits, uniform, 0.0)
    assert z.unique().tolist() == [0, 1] and z.sum() == 8
    logits[1, 1, 3] = float("nan")
    z = rssm_triton.onehot_st(logits, uniform, 0.0).view(4, 2, 5)
    assert z.isnan().all(-1).nonzero().tolist() == [[1, 1]]
    assert torch.equal(z.isnan(), z.isnan().all(-1, keepdim=True).expand_as(z))


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_balanced_kl(variant, dtype, shape):
    post, prior = (torch.randn(shape).to(variant.device, dtype) * 2 for _ in range(2))
    grad = torch.randn(shape[:-2]).to(variant.device, dtype)
    results = []
    for op, dt in (
        (rssm_triton.balanced_kl, dtype),
        (reference_rssm.balanced_kl, dtype),
        (reference_rssm.balanced_kl, torch.double),
    ):
        leaves = [t.to(dt).requires_grad_() for t in (post.detach(), prior.detach())]
        loss, kl = op(*leaves, 0.8)
        assert not kl.requires_grad
        results.append((loss.detach(), kl, *torch.autograd.grad(loss, leaves, grad.to(dt))))
    for name, a, e, r in zip(("loss", "kl", "post", "prior"), *results, strict=True):
        assert_accurate(name, a, e, r)


@triton
def test_kl_of_equal_logits_is_zero_and_nan_stays(variant, dtype):
    post = torch.randn(3, 2, 5, device=variant.device)
    loss, _ = rssm_triton.balanced_kl(post, post, 0.8)
    assert loss.abs().max() < 1e-6
    post[1, 0, 2] = float("nan")
    assert rssm_triton.balanced_kl(post, post, 0.8)[0].isnan().tolist() == [False, True, False]


def episode(T, N, device):
    reward, value, following = (torch.randn(T, N) for _ in range(3))
    terminated = (torch.rand(T, N) < 0.1).float()
    done = torch.maximum(terminated, (torch.rand(T, N) < 0.1).float())
    return [t.to(device) for t in (reward, value, following, terminated, done)]


@triton
@pytest.mark.parametrize("shape", [(1, 1), (36, 5), (64, 17), (65, 3), (150, 2)], ids=str)
def test_gae(variant, dtype, shape):
    args = episode(*shape, variant.device)
    results = (
        rssm_triton.gae(*args, 0.99, 0.95),
        reference_rssm.gae(*args, 0.99, 0.95),
        reference_rssm.gae(*(a.double() for a in args), 0.99, 0.95),
    )
    for name, a, e, r in zip(("advantage", "returns"), *results, strict=True):
        assert_accurate(name, a, e, r)


@triton
def test_gae_of_nothing(variant, dtype):
    for shape in ((0, 3), (3, 0)):
        args = [torch.zeros(shape, device=variant.device)] * 5
        assert rssm_triton.gae(*args, 0.99, 0.95)[0].shape == shape


@triton
@pytest.mark.parametrize(
    "name", ["onehot_st_fwd", "onehot_st_bwd", "balanced_kl_fwd", "balanced_kl_bwd", "gae"]
)
def test_opcheck(variant, dtype, name):
    device = variant.device
    x, uniform = torch.randn(2, 3, 5, device=device), torch.rand(2, 3, device=device)
    args = {
        "onehot_st_fwd": [x, uniform, 0.1],
        "onehot_st_bwd": [x, x, 0.1],
        "balanced_kl_fwd": [x, x],
        "balanced_kl_bwd": [torch.ones(2, device=device), x, x, 0.8],
        "gae": [*episode(3, 2, device), 0.99, 0.95],
    }[name]
    torch.library.opcheck(getattr(torch.ops.diwa, f"{name}_triton").default, args)


@triton
def test_compiles_in_one_graph(variant, dtype):
    torch._dynamo.reset()
    x, uniform = torch.randn(2, 3, 5), torch.rand(2, 3)

    def loss(post, prior):
        z = rssm_triton.onehot_st(post, uniform.to(post.device), 0.0)
        return rssm_triton.balanced_kl(post, prior, 0.8)[0].sum() + z.square().sum()

    results = []
    for fn in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().to(variant.device).requires_grad_() for _ in range(2)]
        results.append(torch.autograd.grad(fn(*leaves), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def prior_weights(U, H, S, C, A):
    def matrix(n, k):
        return torch.randn(n, k) * k**-0.5

    gru = (matrix(3 * H, U), matrix(3 * H, H), torch.randn(3 * H) * 0.1, torch.randn(3 * H) * 0.1)
    norms = [(1 + torch.randn(U) * 0.1, torch.randn(U) * 0.1) for _ in range(2)]
    cell = (matrix(U, S * C), torch.randn(U) * 0.1, matrix(U, A), *norms[0])
    head = (matrix(U, H), torch.randn(U) * 0.1, *norms[1], matrix(S * C, U) * 2, torch.randn(S * C))
    return reference_rssm.RSSMWeights(*cell, *gru, *head, None)


@triton
def test_horizon_of_prior_steps(variant, dtype):
    w = prior_weights(20, 12, 3, 5, 4)
    w = reference_rssm.RSSMWeights(*(t if t is None else t.to(variant.device) for t in w))
    h, z = torch.randn(6, 12).tanh(), torch.randint(5, (6, 3))
    actions, uniforms = torch.randn(3, 6, 4), torch.rand(3, 6, 3)
    args = [t.to(variant.device) for t in (h, z, actions, uniforms)]
    packed = rssm_imagine_gpu.pack(w, torch.float32)
    hs, indices = rssm_imagine_gpu.imagine(w, packed, *args, unimix=0.01, backend=variant.backend)
    eager = reference_rssm.rssm_imagine(w, *args, unimix=0.01)
    exact = reference_rssm.RSSMWeights(*(t if t is None else t.double() for t in w))
    wide = [a.double() if a.is_floating_point() else a for a in args]
    right = reference_rssm.rssm_imagine(exact, *wide, unimix=0.01)
    assert torch.equal(indices, right[1]) and indices.dtype == torch.int64
    assert_accurate("h", hs, eager[0], right[0])


@triton
def test_horizon_in_bfloat16_keeps_a_float32_state(variant, dtype):
    w = prior_weights(16, 16, 2, 4, 3)
    w = reference_rssm.RSSMWeights(*(t if t is None else t.to(variant.device) for t in w))
    args = [torch.randn(5, 16).tanh(), torch.randint(4, (5, 2)), torch.randn(1, 5, 3)]
    args = [t.to(variant.device) for t in (*args, torch.rand(1, 5, 2))]
    packed = rssm_imagine_gpu.pack(w, torch.bfloat16)
    hs, _ = rssm_imagine_gpu.imagine(w, packed, *args, backend=variant.backend)
    right, _ = reference_rssm.rssm_imagine(w, *args)
    assert hs.dtype == torch.float32
    # gates of bfloat16 operands: 2^-8 of sums of size one, halved by the gates' slopes
    assert 0 < (hs - right).abs().max() < 2e-2


@triton
def test_public_operators_take_the_backend(variant, dtype):
    x, u = torch.randn(2, 3, 5, device=variant.device), torch.rand(2, 3, device=variant.device)
    backend = {"backend": variant.backend}
    assert torch.equal(diwa.ops.onehot_st(x, u, **backend), diwa.ops.onehot_st(x, u))
    kl = [diwa.ops.balanced_kl(x, x.flip(0), 0.8, **b)[0] for b in (backend, {})]
    # float32 sums of up to a few hundred terms in another order
    torch.testing.assert_close(*kl, rtol=1e-5, atol=1e-6)
    args = episode(4, 3, variant.device)
    both = [diwa.ops.gae(*args, 0.99, 0.95, **b)[0] for b in (backend, {})]
    # a tree of sums instead of a running one
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)
    with pytest.raises(diwa.ops.BackendError, match="takes float32"):
        diwa.ops.gae(*(a.double() for a in args), 0.99, 0.95, **backend)
    with pytest.raises(diwa.ops.BackendError, match="without gradient"):
        diwa.ops.gae(*(a.requires_grad_() for a in args), 0.99, 0.95, **backend)
    with pytest.raises(diwa.ops.BackendError, match="exceed 16384"):
        diwa.ops.balanced_kl(x.new_zeros(1, 200, 100), x.new_zeros(1, 200, 100), 0.8, **backend)
