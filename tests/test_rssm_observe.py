"""rssm_observe: outputs and every gradient against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F
from optest import assert_accurate, variants

from diwa.nn.rssm import RSSM, RSSMState
from diwa.ops import BackendError, RSSMWeights, rssm_observe, use_backend

CPU = [case for case in variants() if case.id.startswith("cpu")]
TRITON = [case for case in variants() if case.id.startswith("triton")]
each_scan = pytest.mark.parametrize("variant, dtype", CPU + TRITON, indirect=["variant"])
each_isa = pytest.mark.parametrize("variant, dtype", CPU, indirect=["variant"])
# T, B, E, A, H, U, S, C: odd widths, more rows than one tile, one class, one group
SHAPES = [
    (4, 3, 5, 2, 7, 9, 3, 5),
    (3, 67, 6, 7, 16, 12, 2, 8),
    (2, 2, 3, 1, 33, 31, 1, 19),
    (1, 5, 4, 3, 12, 300, 4, 1),
]
INPUTS = ("embed", "action", "h", "z")


@pytest.fixture(autouse=True)
def default_device(request):
    """New tensors are where the variant runs: on a GPU, where there is one."""
    on = request.getfixturevalue("variant").device if "variant" in request.fixturenames else "cpu"
    with torch.device(on):
        yield


def arguments(T=4, B=3, E=5, A=2, H=7, U=9, S=3, C=5):
    """Weights, then embed, action, reset, h, z, uniform; the same numbers on every device."""
    with torch.device("cpu"):
        w, given = _numbers(T, B, E, A, H, U, S, C)
    here = torch.get_default_device()
    return RSSMWeights(*(t.to(here) for t in w)), [t.to(here) for t in given]


def _numbers(T, B, E, A, H, U, S, C):
    shapes = [(U, S * C), (U,), (U, A), (U,), (U,), (3 * H, U), (3 * H, H), (3 * H,), (3 * H,)]
    shapes += [(U, H), (U,), (U,), (U,), (S * C, U), (S * C,), (U, E)]
    w = [torch.randn(s) * (s[-1] ** -0.5 if len(s) > 1 else 0.5) for s in shapes]
    z = F.one_hot(torch.randint(C, (B, S)), C).float().flatten(1)
    reset = (torch.rand(T, B) < 0.3).float()
    given = [torch.randn(T, B, E), torch.randn(T, B, A), reset, torch.randn(B, H), z]
    return RSSMWeights(*w), [*given, torch.rand(T, B, S)]


def run(w, given, grads, **kwargs):
    """Results and the gradient of every weight and of `INPUTS`, by name."""
    w = RSSMWeights(*(t.detach().clone().requires_grad_() for t in w))
    given = [t.detach().clone() for t in given]
    leaves = [given[i].requires_grad_() for i in (0, 1, 3, 4)]
    out = rssm_observe(w, *given, **kwargs)
    wanted = torch.autograd.grad(out, [*w, *leaves], grads)
    names = ("out h", "out z", "out logits", *RSSMWeights._fields, *INPUTS)
    return dict(zip(names, (*(t.detach() for t in out), *wanted), strict=True))


def gradients(given, w, S):
    (T, B, _), Z = given[0].shape, len(w.out)
    return [
        torch.randn(T, B, given[3].shape[1]),
        torch.randn(T, B, Z),
        torch.randn(T, B, S, Z // S),
    ]


def wide(tensors):
    return [t.double() for t in tensors]


def compare(w, given, backend, **kwargs):
    grads = gradients(given, w, given[5].shape[2])
    actual = run(w, given, grads, backend=backend, **kwargs)
    eager = run(w, given, grads, backend="reference", **kwargs)
    exact = run(RSSMWeights(*wide(w)), wide(given), wide(grads), backend="reference", **kwargs)
    assert torch.equal(actual["out z"].double(), exact["out z"])  # no uniform is at an edge here
    for name in actual:
        assert_accurate(name, actual[name], eager[name], exact[name])


@each_scan
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_and_gradients(variant, dtype, shape):
    compare(*arguments(*shape), variant.backend)


@each_scan
def test_long_scan_with_unimix_and_a_carried_state_that_is_no_onehot(variant, dtype):
    w, given = arguments(T=20, B=5, H=40, U=24, S=4, C=6)
    given[4] = torch.randn_like(given[4])
    compare(w, given, variant.backend, unimix=0.1, eps=1e-2)


@each_scan
def test_non_contiguous_arguments(variant, dtype):
    w, given = arguments()
    given = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in given]
    w = RSSMWeights(*(t.t().contiguous().t() if t.dim() == 2 else t for t in w))
    assert not given[0].is_contiguous() and not w.w_ih.is_contiguous()
    compare(w, given, variant.backend)


def test_reference_gradients_are_those_of_finite_differences():
    """In float64, and without the straight-through path, whose gradient is not the difference."""
    w, given = arguments(T=3, B=2, E=3, A=2, H=4, U=5, S=2, C=3)
    w, given = wide(w), wide(given)
    z = given[4]

    def scan(*leaves):
        embed, action, h = leaves[16:]
        full = (embed, action, torch.ones(3, 2).double(), h, z, given[5])
        h, _, logits = rssm_observe(RSSMWeights(*leaves[:16]), *full, backend="reference")
        return h, logits

    leaves = [t.requires_grad_() for t in (*w, given[0], given[1], given[3])]
    assert torch.autograd.gradcheck(scan, leaves)


@each_scan
def test_gradient_flows_through_the_samples(variant, dtype):
    """Only z of the last frame is judged, and the first embedding still matters."""
    w, given = arguments(T=3)
    given[2].zero_()
    embed = given[0].requires_grad_()
    z = rssm_observe(w, *given, backend=variant.backend)[1]
    (grad,) = torch.autograd.grad((z[-1] * torch.randn_like(z[-1])).sum(), embed)
    assert grad.abs().amax((1, 2)).min() > 0


@each_scan
def test_without_gradient_the_same(variant, dtype):
    w, given = arguments(B=9)
    leaf = RSSMWeights(*(t.clone().requires_grad_() for t in w))
    with_grad = rssm_observe(leaf, *given, backend=variant.backend)
    with torch.no_grad():
        without = rssm_observe(leaf, *given, backend=variant.backend)
    assert with_grad[0].requires_grad and not without[0].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(with_grad, without, strict=True))


@each_scan
def test_bfloat16_is_as_close_as_rounding(variant, dtype):
    """Weights and activations keep 8 bits: 2^-9 of each term, some of which add up."""
    torch.manual_seed(527)  # no uniform is nearer than 0.019 to an edge, so all samples are equal
    w, given = arguments(T=3, B=3, E=8, A=3, H=41, U=37, S=3, C=7)
    grads = gradients(given, w, 3)
    near = run(w, given, grads, backend=variant.backend, dtype=torch.bfloat16)
    right = run(w, given, grads, backend="reference")
    assert torch.equal(near["out z"], right["out z"])
    for name in right:
        error = (near[name] - right[name]).norm() / right[name].norm().clamp(min=1e-9)
        assert 0 <= error < 0.03, f"{name}: {error}"
    assert not torch.equal(near["out h"], right["out h"])


@each_scan
@pytest.mark.parametrize("where", [0, 1, 3, 4], ids=INPUTS)
def test_nan_comes_out(variant, dtype, where):
    w, given = arguments(T=3, B=4)
    given[2].zero_()
    place = (0, 1, 0) if where < 2 else (1, 0)
    given[where][place] = torch.nan
    grads = gradients(given, w, 3)
    actual = run(w, given, grads, backend=variant.backend)
    right = run(w, given, grads, backend="reference")
    assert right["out h"].isnan().any()
    for name in actual:
        assert torch.equal(actual[name].isnan(), right[name].isnan()), name


@each_scan
def test_empty(variant, dtype):
    w, given = arguments(T=2, B=0)
    grads = gradients(given, w, 3)
    for name, value in run(w, given, grads, backend=variant.backend).items():
        assert not value.numel() or not value.any(), name
    w, given = arguments(T=0)
    out = rssm_observe(w, *given, backend=variant.backend)
    assert [t.shape for t in out] == [(0, 3, 7), (0, 3, 15), (0, 3, 3, 5)]


@each_scan
def test_deterministic_and_rows_are_independent(variant, dtype):
    w, given = arguments(B=70, H=20, U=18)
    once, again = (rssm_observe(w, *given, backend=variant.backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    part = [t[:, 8:9] if t.dim() == 3 or i == 2 else t[8:9] for i, t in enumerate(given)]
    alone = rssm_observe(w, *part, backend=variant.backend)
    # torch's projections may sum in another order for one row
    torch.testing.assert_close(once[0][:, 8:9], alone[0], rtol=0, atol=1e-5)


@each_isa
def test_compiles_in_one_graph(variant, dtype):
    w, given = arguments()
    torch._dynamo.reset()

    def scan(*leaves):
        return rssm_observe(RSSMWeights(*leaves[:16]), *leaves[16:], backend=variant.backend)

    results = []
    for fn in (scan, torch.compile(scan, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in w]
        out = fn(*leaves, *given)
        loss = sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() for t in out)
        results.append([*out, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # projections may be fused elsewhere


@each_isa
def test_opcheck(variant, dtype, monkeypatch):
    """Both native operators, with the arguments that a real scan gives them."""
    calls = {}
    for name in ("rssm_observe_fwd", "rssm_observe_bwd"):
        op = getattr(torch.ops.diwa, name)

        def spy(*args, name=name, default=op.default):
            calls[name] = (default, args)
            return default(*args)

        monkeypatch.setattr(op, "default", spy)
    w, given = arguments()
    run(w, given, gradients(given, w, 3), backend=variant.backend)
    monkeypatch.undo()
    assert len(calls) == 2
    for op, args in calls.values():
        args = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(op, args, test_utils=checks)
        spoiled = [a[..., :-1] if isinstance(a, torch.Tensor) else a for a in args]
        with pytest.raises(RuntimeError, match="rssm_observe: .* must be"):
            op(*spoiled)


BAD = {
    "embed must be": (0, lambda t: t[0]),
    "action must be": (1, lambda t: t[..., :1]),
    "reset must be": (2, lambda t: t[:2]),
    "h must be": (3, lambda t: t[:, 1:]),
    "z must be": (4, lambda t: t[1:]),
    "uniform must be": (5, lambda t: t[..., :2]),
    "reset must be floating": (2, lambda t: t.long()),
    "h is on meta": (3, lambda t: t.to("meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_argument_is_named(message):
    w, given = arguments()
    which, spoil = BAD[message]
    given[which] = spoil(given[which])
    with pytest.raises((ValueError, TypeError), match=message):
        rssm_observe(w, *given)


def test_what_the_native_scan_cannot_do_is_said():
    w, given = arguments()
    with pytest.raises(BackendError, match="takes float32, not float64"):
        rssm_observe(RSSMWeights(*wide(w)), *wide(given), backend="cpu")
    given[2].requires_grad_()
    with pytest.raises(BackendError, match="no gradient of reset"):
        rssm_observe(w, *given, backend="cpu")
    out = rssm_observe(w, *given)
    assert torch.autograd.grad(out[0].sum(), given[2])[0].any()
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        rssm_observe(w, *given, dtype=torch.float16)
    with pytest.raises(ValueError, match="head_e"):
        rssm_observe(w._replace(head_e=None), *given)


def test_module_runs_the_operator_and_keeps_its_parameters():
    model = RSSM(2, 5, 7, 3, 5, 9)
    _, given = arguments()
    state = RSSMState(given[3], given[4])
    post = model.observe(*given[:3], state, given[5])
    names = {type(node).__name__ for node in _graph(post.h.grad_fn)}
    assert "_ObserveBackward" in names
    with use_backend("reference"):
        plain = model.observe(*given[:3], state, given[5])
        assert "_ObserveBackward" not in {type(n).__name__ for n in _graph(plain.h.grad_fn)}
    for a, b in zip(post, plain, strict=True):
        # float32 sums of up to a few hundred terms in another order
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.observe(*given[:3], state, given[5]).h.shape == post.h.shape
    double = RSSM(2, 5, 7, 3, 5, 9).double()
    state = RSSMState(given[3].double(), given[4].double())
    assert double.observe(*wide(given[:3]), state, given[5].double()).h.dtype == torch.float64


def _graph(node):
    seen, stack = [], [node]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.append(node)
            stack += [n for n, _ in node.next_functions]
    return seen
