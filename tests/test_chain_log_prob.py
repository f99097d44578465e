"""chain_log_prob: values and gradients against autograd of the reference, grouped and shuffled."""

import pytest
import torch
from optest import CPU_ISAS, assert_accurate
from test_denoise_chain import CONFIG, Case, widen

from diwa.nn.schedule import NoiseSchedule
from diwa.ops import BackendError, chain_log_prob

K = 6
STEPS = NoiseSchedule(K).tables(CONFIG, explore=True)
each_isa = pytest.mark.parametrize("variant", CPU_ISAS, indirect=True)
CASES = [
    Case(5, K=K),
    Case(3, P=7, W=33, H=30, layers=4, K=K),
    Case(4, P=1, W=9, layers=0, K=K),
    Case(6, W=17, layers=3, residual=False, K=K),
    Case(2, W=8, layers=0, residual=False, K=K),
    Case(1, W=64, H=300, layers=1, residual=False, K=K),
]
FORMS = ["grouped", "shuffled", "mixed"]


def data(case, form):
    """feature, x, x_next, step: chains near the policy's own, so that few values are clamped."""
    groups = 1 if form == "shuffled" else 4
    feature = torch.randn(case.N, case.H + case.S * case.C)
    x = 0.5 * torch.randn(case.N, groups, case.P)
    x_next = x + 0.2 * torch.randn(case.N, groups, case.P)
    if form == "grouped":
        return feature, x, x_next, torch.tensor([3, 2, 1, 0])
    return feature, x, x_next, torch.randint(K, (case.N, groups))


def leaves(net):
    tensors = [t for t in net[:4]]
    tensors += [t for layer in net.hidden for t in layer]
    return [*tensors, net.out, net.out_bias]


def copy_of(net, dtype=torch.float32):
    def leaf(value):
        if isinstance(value, torch.Tensor):
            return value.detach().to(dtype).clone().requires_grad_()
        return tuple(leaf(v) for v in value) if isinstance(value, tuple) else value

    return type(net)(*(leaf(v) for v in net))


def run(net, inputs, grad, backend, dtype=torch.float32):
    """Log-prob and the gradient of every weight."""
    net, steps = copy_of(net, dtype), STEPS if dtype == torch.float32 else widen(STEPS)
    *floats, step = inputs
    out = chain_log_prob(net, *(t.to(dtype) for t in floats), step, steps, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves(net), grad.to(dtype))]


@each_isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(variant, case, form):
    net, inputs = case.network(), data(case, form)
    grad = torch.randn(inputs[1].shape)
    parts = zip(
        run(net, inputs, grad, variant.backend),
        run(net, inputs, grad, "reference"),
        run(net, inputs, grad, "reference", torch.float64),
        strict=True,
    )
    for i, (actual, eager, right) in enumerate(parts):
        # clamped or not: decided alike, as no estimate lies within rounding of the bound
        assert_accurate(f"result {i}", actual, eager, right)


@each_isa
def test_grouped_and_shuffled_are_the_same_sum(variant):
    case = CASES[0]
    net, (feature, x, x_next, step) = case.network(), data(case, "grouped")
    grad = torch.randn(x.shape)
    grouped = run(net, (feature, x, x_next, step), grad, variant.backend)
    order = torch.randperm(case.N * 4)
    pairs = (
        feature.repeat_interleave(4, 0)[order],
        x.flatten(0, 1)[order, None],
        x_next.flatten(0, 1)[order, None],
        step.repeat(case.N)[order, None],
    )
    shuffled = run(net, pairs, grad.flatten(0, 1)[order, None], variant.backend)
    flat = torch.empty_like(shuffled[0])
    flat[:] = grouped[0].flatten(0, 1)[order, None]
    for a, b in zip([flat, *grouped[1:]], shuffled, strict=True):
        # the same terms, summed in another order: a few eps of the largest
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * b.abs().max().item() + 1e-6)


@each_isa
def test_no_gradient_where_clamped(variant):
    case = CASES[0]
    net, (feature, x, _, step) = case.network(), data(case, "grouped")
    x, net = torch.full_like(x, 50.0), net._replace(out=net.out * 1e-3)
    grads = run(net, (feature, x, x, step), torch.ones_like(x), variant.backend)[1:]
    assert not any(g.any() for g in grads)


@each_isa
def test_nan_comes_out(variant):
    case = CASES[0]
    for where in range(3):
        net, inputs = case.network(), data(case, "grouped")
        inputs[where][2, ..., 3] = float("nan")
        out = chain_log_prob(net, *inputs, STEPS, backend=variant.backend)
        right = chain_log_prob(net, *inputs, STEPS, backend="reference")
        assert torch.equal(out.isnan(), right.isnan()) and out.isnan().any()


@each_isa
def test_empty_and_non_contiguous(variant):
    case = CASES[0]
    net, inputs = case.network(), data(case, "grouped")
    right = chain_log_prob(net, *inputs, STEPS, backend=variant.backend)
    feature, x, x_next, step = inputs
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (feature, x, x_next)]
    out = chain_log_prob(net, *strided, step, STEPS, backend=variant.backend)
    assert torch.equal(out, right)
    empty = run(net, (feature[:0], x[:0], x_next[:0], step), x[:0], variant.backend)
    assert empty[0].shape == (0, 4, 28) and not any(g.any() for g in empty[1:])


@each_isa
def test_compiles_in_one_graph(variant):
    case = CASES[0]
    inputs = data(case, "grouped")
    grad = torch.randn(inputs[1].shape)
    torch._dynamo.reset()

    def log_prob(net):
        return chain_log_prob(net, *inputs, STEPS, backend=variant.backend).exp()

    results = []
    for fn in (log_prob, torch.compile(log_prob, fullgraph=True, backend="aot_eager")):
        net = copy_of(case.network())
        out = fn(net)
        results.append([out, *torch.autograd.grad(out, leaves(net), grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the same operators


def test_reference_passes_gradcheck():
    case = Case(2, P=3, W=4, H=2, S=1, C=2, K=K)
    net, inputs = case.network(dtype=torch.float64), data(case, "mixed")
    *floats, step = inputs
    floats = [t.double() for t in floats]

    def log_prob(*tensors):
        first, rest = tensors[:4], tensors[4:-2]
        hidden = tuple(zip(rest[::2], rest[1::2], strict=True))
        return chain_log_prob(
            type(net)(*first, hidden, *tensors[-2:], net.residual), *floats, step, widen(STEPS)
        )

    assert torch.autograd.gradcheck(log_prob, [t.requires_grad_() for t in leaves(net)])


def test_falls_back_where_it_gives_no_gradient():
    case = CASES[0]
    net, (feature, x, x_next, step) = case.network(), data(case, "grouped")
    feature.requires_grad_()
    chain_log_prob(net, feature, x, x_next, step, STEPS).sum().backward()
    assert feature.grad.any()
    with pytest.raises(BackendError, match="no gradient of the feature|not built"):
        chain_log_prob(net, feature, x, x_next, step, STEPS, backend="cpu")


def test_refuses_wrong_arguments():
    case = CASES[0]
    net, (feature, x, x_next, step) = case.network(), data(case, "grouped")
    for args, message in [
        ((feature[:, :-1], x, x_next, step), r"feature must be \[M, 30\], got \[5, 29\]"),
        ((feature, x[0], x_next, step), r"x must be \[M, G, P\] = \[5, G, 28\]"),
        ((feature, x[:3], x_next, step), r"x must be \[M, G, P\]"),
        ((feature, x, x_next[:, 1:], step), r"x_next must be \[5, 4, 28\] as x"),
        ((feature, x, x_next, step[1:]), r"step must be int64 \[5, 4\] or \[4\]"),
        ((feature, x, x_next, step.int()), "step must be int64"),
        ((feature, x.double(), x_next, step), "x is torch.float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            chain_log_prob(net, *args, STEPS)
    with pytest.raises(ValueError, match="6 rows of time for 5 steps"):
        chain_log_prob(net, feature, x, x_next, step, Case(1).steps())
    with pytest.raises(IndexError):
        chain_log_prob(net, feature, x, x_next, step + K, STEPS)
