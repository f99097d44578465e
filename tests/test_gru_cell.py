import copy
import doctest

import pytest
import torch
from optest import HALVES, Variant, assert_accurate, variants

import diwa.nn
import diwa.nn.gru
from diwa.ops import gru_cell, reference

NAMES = ("x", "h", "w_ih", "w_hh", "b_ih", "b_hh")
ODD_SHAPES = [(3, 5, 7), (2, 8, 64), (1, 3, 129)]  # B, I, H


def arguments(B, I, H, dtype=torch.float32, device="cpu", grad=False):  # noqa: E741
    """x, h, w_ih, w_hh, b_ih, b_hh with values that the dtype represents exactly."""
    shapes = [(B, I), (B, H), (3 * H, I), (3 * H, H), (3 * H,), (3 * H,)]
    scale = [1, 1, I**-0.5, H**-0.5, 0.5, 0.5]
    tensors = [torch.randn(s) * k for s, k in zip(shapes, scale, strict=True)]
    return [t.to(device, dtype).requires_grad_(grad) for t in tensors]


def run(args, grad, **kwargs):
    """Output and the gradient of every argument, on copies of `args`."""
    leaves = [a.detach().clone().requires_grad_() for a in args]
    out = gru_cell(*leaves, **kwargs)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def exact(args, grad):
    return run([a.double() for a in args], grad.double(), backend="reference")


def gates(B, H, dtype=torch.float32, device="cpu"):
    sizes = (3 * H, 3 * H, H)
    return [torch.randn(B, n).to(device, dtype) for n in sizes]


@pytest.mark.parametrize("variant, dtype", variants(*HALVES), indirect=["variant"])
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=lambda s: "B{}-I{}-H{}".format(*s))
def test_output_and_gradients(variant, dtype, shape):
    args = arguments(*shape, dtype, variant.device)
    grad = torch.randn(shape[0], shape[2]).to(variant.device, dtype)
    results = zip(
        ("out", *NAMES),
        run(args, grad, backend=variant.backend),
        run(args, grad, backend="reference"),
        exact(args, grad),
        strict=True,
    )
    for name, actual, eager, right in results:
        assert_accurate(name, actual, eager, right)


def operators(variant):
    suffix = "_triton" if variant.backend == "triton" else ""
    return [getattr(torch.ops.diwa, f"gru_gates_{way}{suffix}").default for way in ("fwd", "bwd")]


def check_gates(variant, B, H, dtype):
    """Both operators without the GEMMs around them, so that no sum hides or makes an error."""
    args = gates(B, H, dtype, variant.device)
    grad = torch.randn(B, H).to(variant.device, dtype)
    fwd, bwd = operators(variant)
    wide = [t.double() for t in args]
    right = reference.gru_gates(*wide)
    assert_accurate("out", fwd(*args), reference.gru_gates(*args), right)
    eager = reference.gru_gates_bwd(grad, *args)
    right = reference.gru_gates_bwd(grad.double(), *wide)
    for name, a, e, r in zip(("gi", "gh", "h"), bwd(grad, *args), eager, right, strict=True):
        assert_accurate(name, a, e, r)


@pytest.mark.parametrize("variant, dtype", variants(*HALVES), indirect=["variant"])
@pytest.mark.parametrize("H", [1, 16, 31])
def test_gates(variant, dtype, H):
    check_gates(variant, 33, H, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("H", [1000, 1024, 3000])
def test_large_gates_on_gpu(backend, H):
    check_gates(Variant(backend, "cuda"), 2048, H, torch.float32)


@pytest.mark.parametrize("variant, dtype", variants(*HALVES), indirect=["variant"])
def test_saturated_gates(variant, dtype):
    gi, gh, h = (t * 100 for t in gates(4, 33, dtype, variant.device))
    out = operators(variant)[0](gi, gh, h)
    wide = [t.double() for t in (gi, gh, h)]
    assert_accurate("out", out, reference.gru_gates(gi, gh, h), reference.gru_gates(*wide))


@pytest.mark.parametrize("variant, dtype", variants(), indirect=["variant"])
def test_small_values_keep_their_digits(variant, dtype):
    """tanh near zero must not cancel: relative, not absolute, accuracy."""
    gi, gh, h = (t * 1e-4 for t in gates(2, 40, dtype, variant.device))
    out = operators(variant)[0](gi, gh, h)
    wide = [t.double() for t in (gi, gh, h)]
    assert_accurate("out", out, reference.gru_gates(gi, gh, h), reference.gru_gates(*wide))


@pytest.mark.parametrize("variant, dtype", variants(), indirect=["variant"])
def test_without_bias_and_non_contiguous(variant, dtype):
    x, h, w_ih, w_hh, _, _ = arguments(4, 6, 10, dtype, variant.device)
    strided = [t.t().contiguous().t() for t in (x, h, w_ih, w_hh)]
    assert not any(t.is_contiguous() for t in strided)
    grad = torch.ones(1, 1, device=variant.device).expand(4, 10)  # as from .sum()
    actual = run(strided, grad, backend=variant.backend)
    eager = run([x, h, w_ih, w_hh], grad, backend="reference")
    for name, a, e, r in zip(
        ("out", *NAMES[:4]), actual, eager, exact([x, h, w_ih, w_hh], grad), strict=True
    ):
        assert_accurate(name, a, e, r)


@pytest.mark.parametrize("variant, dtype", variants(), indirect=["variant"])
def test_empty_batch(variant, dtype):
    args = arguments(0, 3, 5, dtype, variant.device)
    out, *grads = run(args, torch.empty(0, 5, device=variant.device), backend=variant.backend)
    assert out.shape == (0, 5)
    assert all(g.eq(0).all() for g in grads)


@pytest.mark.parametrize("variant, dtype", variants(*HALVES), indirect=["variant"])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["gi", "gh", "h"])
def test_nan_comes_out(variant, dtype, where):
    args = gates(3, 21, dtype, variant.device)
    args[where][1, 4] = args[where][2, -1] = float("nan")
    fwd, bwd = operators(variant)
    out, grads = fwd(*args), bwd(torch.ones_like(args[2]), *args)
    right = (reference.gru_gates(*args), *reference.gru_gates_bwd(torch.ones_like(args[2]), *args))
    for a, r in zip((out, *grads), right, strict=True):
        assert torch.equal(a.isnan(), r.isnan())


@pytest.mark.parametrize("variant, dtype", variants(), indirect=["variant"])
def test_deterministic(variant, dtype):
    args, grad = (
        arguments(9, 4, 50, dtype, variant.device),
        torch.randn(9, 50, device=variant.device),
    )
    once, again = (run(args, grad, backend=variant.backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("variant, dtype", variants(), indirect=["variant"])
def test_opcheck(variant, dtype):
    args = gates(3, 7, dtype, variant.device)
    fwd, bwd = operators(variant)
    torch.library.opcheck(fwd, args)
    torch.library.opcheck(bwd, [args[2], *args])


@pytest.mark.parametrize("variant, dtype", variants(), indirect=["variant"])
def test_compiles_in_one_graph(variant, dtype):
    args = arguments(3, 4, 6, dtype, variant.device)
    grad = torch.randn(3, 6, device=variant.device)
    torch._dynamo.reset()

    def step(*leaves):
        return gru_cell(*leaves, backend=variant.backend).sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (step, compiled):
        leaves = [a.clone().requires_grad_() for a in args]
        out = fn(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_compiles_with_inductor():
    args = arguments(3, 4, 6, grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: gru_cell(*a).tanh(), fullgraph=True)
    right = gru_cell(*args).tanh()
    out = compiled(*args)
    # inductor's tanh is a vector routine of its own: a few units in the last place of one
    torch.testing.assert_close(out, right, rtol=0, atol=5e-7)
    grads = zip(
        torch.autograd.grad(out.sum(), args), torch.autograd.grad(right.sum(), args), strict=True
    )
    for a, b in grads:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # sums over 3 rows of 1 - tanh²


def test_reference_is_torch_and_differentiates():
    args = [t.double() for t in arguments(3, 4, 5)]
    right = torch.gru_cell(*args)
    assert torch.allclose(reference.gru_cell(*args), right, rtol=1e-14, atol=1e-14)  # a few eps
    leaves = [a.requires_grad_() for a in args]
    assert torch.autograd.gradcheck(lambda *a: gru_cell(*a, backend="reference"), leaves)
    assert torch.autograd.gradgradcheck(lambda *a: gru_cell(*a, backend="reference"), leaves)


def test_reference_backward_is_autograd():
    args = [t.double().requires_grad_() for t in gates(3, 5)]
    grad = torch.randn(3, 5, dtype=torch.double)
    right = torch.autograd.grad(reference.gru_gates(*args), args, grad)
    for a, b in zip(reference.gru_gates_bwd(grad, *args), right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)  # a few eps of float64


BAD = {
    "x must be": (0, lambda t: t[0]),
    "h must be": (1, lambda t: t[:2]),
    "w_ih must be": (2, lambda t: t[:, :2]),
    "w_hh must be": (3, lambda t: t[:-1]),
    "b_ih must be": (4, lambda t: t[:-1]),
    "b_hh must be": (5, lambda t: t[None]),
    "w_hh is torch.float64": (3, lambda t: t.double()),
    "b_ih is on meta": (4, lambda t: t.to("meta")),
    "h must be floating": (1, lambda t: t.long()),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_argument_is_named(message):
    args = arguments(3, 4, 5)
    which, spoil = BAD[message]
    args[which] = spoil(args[which])
    with pytest.raises((ValueError, TypeError), match=message):
        gru_cell(*args)


def test_module_exchanges_state_with_torch():
    mine, theirs = diwa.nn.GRUCell(6, 9), torch.nn.GRUCell(6, 9)
    mine.load_state_dict(theirs.state_dict())
    x, h = torch.randn(4, 6), torch.randn(4, 9)
    for inputs in ((x, h), (x,), (x[0], h[0]), (x[0],)):
        torch.testing.assert_close(mine(*inputs), theirs(*inputs), rtol=0, atol=5e-7)  # 4 eps of 1
    theirs.load_state_dict(mine.state_dict())
    assert isinstance(mine, torch.nn.GRUCell)


def test_module_copies_casts_and_autocasts():
    cell = diwa.nn.GRUCell(6, 9)
    x, h = torch.randn(4, 6), torch.randn(4, 9)
    assert torch.equal(copy.deepcopy(cell)(x, h), cell(x, h))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = cell(x, h)
    assert mixed.dtype == torch.float32
    # GEMM operands rounded to 8 bits: 2^-8 of sums of size one, halved by the gates' slopes
    torch.testing.assert_close(mixed, cell(x, h), rtol=0, atol=1e-2)
    half = copy.deepcopy(cell).to(torch.bfloat16)
    assert half(x.bfloat16(), h.bfloat16()).dtype == torch.bfloat16
    assert copy.deepcopy(cell).double()(x.double()).dtype == torch.float64


def test_module_refuses_wrong_ranks():
    cell = diwa.nn.GRUCell(6, 9)
    with pytest.raises(ValueError, match="input must be"):
        cell(torch.randn(1, 2, 6))
    with pytest.raises(ValueError, match="hx is 1-D"):
        cell(torch.randn(2, 6), torch.randn(9))


def test_docstring_example_runs():
    failures, examples = doctest.testmod(diwa.nn.gru)
    assert examples and not failures
