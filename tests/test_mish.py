import pytest
import torch
import torch.nn.functional as F
from optest import assert_accurate, variants

from diwa.ops import BackendError, mish, reference

FWD = getattr(torch.ops.diwa, "mish_fwd", None)
BWD = getattr(torch.ops.diwa, "mish_bwd", None)
# around every width of vector, and enough elements for two threads
SHAPES = [(), (1,), (3, 5), (16,), (2, 3, 31), (129, 257)]
CPU = [case for case in variants() if case.id.startswith("cpu")]
each_isa = pytest.mark.parametrize("variant, dtype", CPU, indirect=["variant"])


def run(x, grad, **kwargs):
    """Output and gradient on a copy of `x`."""
    leaf = x.detach().clone().requires_grad_()
    out = mish(leaf, **kwargs)
    return out.detach(), torch.autograd.grad(out, leaf, grad)[0]


def check(x, grad, backend):
    results = zip(
        ("out", "grad"),
        run(x, grad, backend=backend),
        run(x, grad, backend="reference"),
        run(x.double(), grad.double(), backend="reference"),
        strict=True,
    )
    for name, actual, eager, right in results:
        assert_accurate(name, actual, eager, right)


@each_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_and_gradient(variant, dtype, shape):
    check(torch.randn(shape) * 3, torch.randn(shape), variant.backend)


@each_isa
def test_every_digit(variant, dtype):
    """Relative error, over the range where e^x is a normal number: a few units in the last place
    (two roundings each in e^x, n, n / (n + 2) and the product)."""
    x = torch.cat([torch.linspace(-86, 120, 200_001), torch.logspace(-30, 0, 1000)])
    x = torch.cat([x, -x[-1000:]])
    right = reference.mish(x.double())
    assert ((FWD(x).double() - right) / right).abs().nan_to_num(0).max() < 4 * 2**-23
    # the slope crosses zero at -1.19 and cancels there, so relative to the size of its terms
    right = reference.mish_bwd(torch.ones_like(x).double(), x.double())
    terms = right.abs() + (x.double().clamp(max=0) * torch.sigmoid(x.double())).abs()
    error = (BWD(torch.ones_like(x), x).double() - right).abs()
    assert (error / terms).nan_to_num(0).max() < 4 * 2**-23


@each_isa
def test_large_values(variant, dtype):
    x = torch.tensor([20.0, 21, 88, 100, 1e10, 3e38, -20, -87, -87.5, -88, -100, -1e10, -3e38])
    out, slope = run(x, torch.ones_like(x), backend=variant.backend)
    assert torch.equal(out[:6], x[:6]) and slope[:6].eq(1).all()
    # below -87 the result is under 87 e^-87, which may be flushed to zero, and never more
    right = reference.mish(x.double())
    torch.testing.assert_close(out[6:].double(), right[6:], rtol=1e-6, atol=1.5e-36)
    assert slope[6:].abs().max() < 1e-7 and slope[7:].abs().max() < 1.5e-36


@each_isa
def test_nan_and_infinity(variant, dtype):
    """As torch forwards; backwards the slope at +inf is its limit, one, where torch's is NaN."""
    nan, inf = float("nan"), float("inf")
    for n in (7, 33):
        x = torch.zeros(n)
        x[1], x[3], x[-1], x[-2] = inf, -inf, nan, nan
        out, slope = run(x, torch.ones(n), backend=variant.backend)
        torch.testing.assert_close(out, reference.mish(x), rtol=0, atol=0, equal_nan=True)
        assert slope[1] == 1 and slope[0] == 0.6
        assert slope.isnan().nonzero().flatten().tolist() == [3, n - 2, n - 1]
        grad = torch.ones(n)
        grad[0] = nan
        assert BWD(grad, torch.ones(n)).isnan().nonzero().flatten().tolist() == [0]


@each_isa
def test_non_contiguous(variant, dtype):
    x = torch.randn(10, 6).t()
    grad = torch.ones(1, 1).expand(6, 10)  # as from .sum()
    assert not x.is_contiguous()
    check(x, grad, variant.backend)
    check(torch.randn(40)[::2], torch.randn(20), variant.backend)


@each_isa
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0, 2)], ids=str)
def test_empty(variant, dtype, shape):
    out, grad = run(torch.empty(shape), torch.empty(shape), backend=variant.backend)
    assert out.shape == grad.shape == shape


@each_isa
def test_deterministic(variant, dtype):
    """A value does not depend on its place: the end of a row runs through the same arithmetic."""
    x, grad = torch.randn(50_001), torch.randn(50_001)
    whole = run(x, grad, backend=variant.backend)
    tail = run(x[-5:], grad[-5:], backend=variant.backend)
    assert all(torch.equal(a[-5:], b) for a, b in zip(whole, tail, strict=True))


@each_isa
def test_opcheck(variant, dtype):
    x = torch.randn(3, 7)
    torch.library.opcheck(FWD.default, (x,))
    torch.library.opcheck(BWD.default, (torch.randn(3, 7), x))
    torch.library.opcheck(FWD.default, (x.t(),))


@each_isa
def test_operators_refuse_wrong_arguments(variant, dtype):
    x = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match="float32 only"):
        FWD(x.double())
    for grad in (torch.zeros(4, 3), torch.zeros(12)):
        with pytest.raises(RuntimeError, match="shape of x"):
            BWD(grad, x)


@each_isa
def test_compiles_in_one_graph(variant, dtype):
    x, grad = torch.randn(3, 6), torch.randn(3, 6)
    torch._dynamo.reset()

    def step(x):
        return mish(x, backend=variant.backend).sin()

    results = []
    for fn in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        out = fn(leaf)
        results.append([out, *torch.autograd.grad(out, leaf, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_reference_is_torch_and_differentiates():
    x = torch.randn(3, 5, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(mish(x), x * torch.tanh(F.softplus(x)), rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(lambda a: mish(a, backend="reference"), x)
    assert torch.autograd.gradgradcheck(lambda a: mish(a, backend="reference"), x)


def test_reference_backward_is_autograd():
    x = torch.randn(50, dtype=torch.double, requires_grad=True)
    grad = torch.randn(50, dtype=torch.double)
    (right,) = torch.autograd.grad(reference.mish(x), x, grad)
    # a few eps of float64
    torch.testing.assert_close(reference.mish_bwd(grad, x), right, rtol=1e-12, atol=1e-14)


def test_dtypes():
    x = torch.randn(9)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert mish(x.to(dtype)).dtype == dtype
    with pytest.raises(TypeError, match="x must be floating point, got torch.int64"):
        mish(torch.arange(3))
    with pytest.raises(BackendError, match="takes float32, not float64|not built"):
        mish(x.double(), backend="cpu")
