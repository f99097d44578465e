"""The steps between GEMMs: onehot_ln_elu, sample_categorical, denoise_step and Triton's mish."""

import pytest
import torch
from optest import HALVES, assert_accurate, variants

from diwa.ops import BackendError, denoise_step, mish, onehot_ln_elu, reference, sample_categorical
from diwa.ops import reference_gpu as specification

TRITON = [case for case in variants(*HALVES) if case.id.startswith("triton")]
FLOAT32 = [case for case in variants() if case.id.startswith("triton")]
each_dtype = pytest.mark.parametrize("variant, dtype", TRITON, indirect=["variant"])
triton = pytest.mark.parametrize("variant, dtype", FLOAT32, indirect=["variant"])


def wide(t):
    return t.double() if t is not None and t.dtype.is_floating_point else t


def cell(N, U, S, C, A, dtype, device, dense=False):
    """Arguments of `reference_gpu.onehot_ln_elu` but eps, with the table of a trained size."""
    floats = {
        "x": torch.randn(N, U) if dense else None,
        "table": torch.randn(S * C, U) * max(S, 1) ** -0.5 if S else None,
        "action": torch.randn(N, A) if A else None,
        "w_a": torch.randn(A, U) if A else None,
        "bias": torch.randn(U) * 0.1,
        "gain": 1 + torch.randn(U) * 0.1,
        "shift": torch.randn(U) * 0.1,
    }
    args = {k: v if v is None else v.to(device, dtype) for k, v in floats.items()}
    return args | {"idx": torch.randint(C, (N, S)).to(device) if S else None}


@each_dtype
@pytest.mark.parametrize(
    "shape", [(3, 33, 4, 5, 7), (2, 64, 1, 32, 3), (1, 7, 9, 2, 0), (4, 40, 0, 0, 7)], ids=str
)
def test_onehot_ln_elu(variant, dtype, shape):
    args = cell(*shape, dtype, variant.device)
    out = onehot_ln_elu(**args, backend=variant.backend)
    eager = onehot_ln_elu(**args, backend="reference")
    right = specification.onehot_ln_elu(**{k: wide(v) for k, v in args.items()}, eps=1e-3)
    assert_accurate("out", out, eager, right)


@each_dtype
def test_ln_elu_of_a_dense_row(variant, dtype):
    args = cell(5, 100, 0, 0, 0, dtype, variant.device, dense=True)
    args["x"] = args["x"] * 10 + 3  # a mean far from zero: E[x²] - E[x]² would lose digits
    out = onehot_ln_elu(**args, backend=variant.backend)
    eager = onehot_ln_elu(**args, backend="reference")
    right = specification.onehot_ln_elu(**{k: wide(v) for k, v in args.items()}, eps=1e-3)
    assert_accurate("out", out, eager, right)


@triton
def test_dtypes_may_differ(variant, dtype):
    """bfloat16 tables and GEMM results in, bfloat16 out, float32 in between."""
    args = cell(4, 33, 3, 5, 2, dtype, variant.device, dense=True)
    for name in ("x", "table"):
        args[name] = args[name].bfloat16()
    how = {"out_dtype": torch.bfloat16, "backend": variant.backend}
    out = onehot_ln_elu(**args, **how)
    eager = onehot_ln_elu(**args, **how | {"backend": "reference"})
    right = specification.onehot_ln_elu(**{k: wide(v) for k, v in args.items()}, eps=1e-3)
    assert_accurate("out", out, eager, right)


@triton
def test_unknown_class_gives_nan_in_its_row_only(variant, dtype):
    args = cell(4, 20, 3, 5, 2, dtype, variant.device)
    args["idx"][1, 2], args["idx"][3, 0] = -1, 5
    out = onehot_ln_elu(**args, backend=variant.backend)
    right = onehot_ln_elu(**args, backend="reference")
    assert out.isnan().all(1).tolist() == [False, True, False, True]
    assert torch.equal(out.isnan(), right.isnan())


@triton
def test_small_results_keep_their_digits(variant, dtype):
    args = cell(2, 32, 2, 3, 2, dtype, variant.device)
    args["gain"], args["shift"] = args["gain"] * 0, -torch.logspace(-6, -1, 32).to(variant.device)
    out = onehot_ln_elu(**args, backend=variant.backend)
    right = torch.expm1(args["shift"].double()).expand(2, -1)
    # a few roundings in tanh and in the quotient, relative to each value
    torch.testing.assert_close(out.double(), right, rtol=4e-7, atol=0)


BAD_CELL = {
    "gain must be": ("gain", lambda t: t[:-1]),
    "table must be": ("table", lambda t: t[:, :-1]),
    "idx must be": ("idx", lambda t: t[0]),
    "idx is torch.int32": ("idx", lambda t: t.int()),
    "action must be": ("action", lambda t: t[:-1]),
    "w_a is torch.int64": ("w_a", lambda t: t.long()),
    "idx and table go together": ("table", lambda t: None),
    "shift is on meta": ("shift", lambda t: t.to("meta")),
}


@pytest.mark.parametrize("message", BAD_CELL)
def test_bad_argument_of_onehot_ln_elu_is_named(message):
    args = cell(3, 8, 2, 4, 3, torch.float32, "cpu")
    name, spoil = BAD_CELL[message]
    args[name] = spoil(args[name])
    with pytest.raises((ValueError, TypeError), match=message):
        onehot_ln_elu(**args)


@triton
def test_row_too_wide_for_registers_is_refused_or_passed_over(variant, dtype):
    args = cell(1, 4097, 0, 0, 2, dtype, variant.device)
    with pytest.raises(BackendError, match="4097 exceeds 4096"):
        onehot_ln_elu(**args, backend=variant.backend)
    assert onehot_ln_elu(**args).shape == (1, 4097)


def check_samples(index, logits, uniform, temperature, unimix):
    """u lies in the class's interval of the exact distribution, up to the rounding of its sums."""
    probs = specification.mixed_probabilities(logits.double() / temperature, unimix)
    high = probs.cumsum(-1).gather(-1, index[..., None])[..., 0]
    low = high - probs.gather(-1, index[..., None])[..., 0]
    slack = 8 * 2**-24 * logits.shape[-1] ** 0.5
    assert (low - slack <= uniform).all()
    assert ((uniform <= high + slack) | (index == logits.shape[-1] - 1)).all()


@each_dtype
@pytest.mark.parametrize("shape", [(3, 2, 5), (7, 32), (2, 3, 33), (1, 1)], ids=str)
@pytest.mark.parametrize("temperature, unimix", [(1.0, 0.0), (0.5, 0.1)])
def test_sample_categorical(variant, dtype, shape, temperature, unimix):
    logits = (torch.randn(shape) * 2).to(variant.device, dtype)
    uniform = torch.rand(shape[:-1]).to(variant.device)
    how = {"temperature": temperature, "unimix": unimix, "backend": variant.backend}
    index = sample_categorical(logits, uniform, **how)
    assert index.dtype == torch.int64 and index.shape == uniform.shape
    scaled = logits.float() / temperature  # half precision would round the quotient
    check_samples(index, scaled, uniform, 1.0, unimix)
    onehot = sample_categorical(logits, uniform, onehot=True, **how)
    assert onehot.dtype == dtype and torch.equal(onehot.argmax(-1), index)
    assert onehot.sum(-1).eq(1).all() and onehot.amax(-1).eq(1).all()


@triton
def test_samples_at_the_ends_and_the_reference_agree(variant, dtype):
    logits = torch.tensor([[0.0, -200, 0, 0], [5, 1, 0, -1]], device=variant.device)
    for value in (0.0, 0.3, 0.6, 1 - 2**-24):
        uniform = torch.full((2,), value, device=variant.device)
        index = sample_categorical(logits, uniform, backend=variant.backend)
        assert torch.equal(index, sample_categorical(logits, uniform, backend="reference"))
        assert index[0] != 1


@each_dtype
def test_nan_logit_has_no_class(variant, dtype):
    logits = torch.randn(2, 3, 5).to(variant.device, dtype)
    logits[0, 1, 2], logits[1, 2, 0] = float("nan"), float("inf")
    uniform = torch.rand(2, 3, device=variant.device)
    index = sample_categorical(logits, uniform, backend=variant.backend)
    assert index.flatten().eq(-1).nonzero().flatten().tolist() == [1, 5]
    onehot = sample_categorical(logits, uniform, onehot=True, backend=variant.backend)
    assert torch.equal(onehot.isnan().all(-1), index == -1)
    eager = sample_categorical(logits, uniform, onehot=True, backend="reference")
    assert torch.equal(eager.isnan(), onehot.isnan())


def test_bad_argument_of_sample_categorical_is_named():
    logits, uniform = torch.randn(2, 3), torch.rand(2)
    with pytest.raises(ValueError, match="uniform must be"):
        sample_categorical(logits, uniform[:1])
    with pytest.raises(ValueError, match="temperature must be > 0"):
        sample_categorical(logits, uniform, temperature=0.0)
    with pytest.raises(ValueError, match="unimix must be in"):
        sample_categorical(logits, uniform, unimix=1.5)
    with pytest.raises(TypeError, match="logits must be floating"):
        sample_categorical(logits.long(), uniform)


def step_arguments(N, P, device, std=0.3):
    table = torch.tensor([1.7, 1.3, 0.4, 0.55, std, std / 0.35, -0.13])
    return [t.to(device) for t in (torch.randn(N, P), torch.randn(N, P), torch.randn(N, P) * 2)] + [
        table.to(device)
    ]


@triton
@pytest.mark.parametrize("shape", [(3, 28), (1, 7), (40, 33)], ids=str)
@pytest.mark.parametrize("half", [False, True])
def test_denoise_step(variant, dtype, shape, half):
    args = step_arguments(*shape, variant.device)
    if half:
        args[1] = args[1].bfloat16()
    actual = denoise_step(*args, backend=variant.backend)
    eager = denoise_step(*args, backend="reference")
    right = specification.denoise_step(*(wide(t) for t in args), 3.0)
    for name, a, e, r in zip(("x", "log_prob"), actual, eager, right, strict=True):
        assert_accurate(name, a, e, r)


@triton
@pytest.mark.parametrize("where", [0, 1, 2], ids=["x", "eps", "noise"])
def test_nan_passes_the_clamps(variant, dtype, where):
    args = step_arguments(2, 5, variant.device)
    args[where][1, 3] = float("nan")
    out, log_prob = denoise_step(*args, backend=variant.backend)
    assert out.isnan().nonzero().tolist() == [[1, 3]]
    assert log_prob.isnan().nonzero().tolist() == ([[1, 3]] if where == 2 else [])


def test_bad_argument_of_denoise_step_is_named():
    args = step_arguments(2, 5, "cpu")
    with pytest.raises(ValueError, match="eps must be"):
        denoise_step(args[0], args[1][:1], *args[2:])
    with pytest.raises(ValueError, match="table must be"):
        denoise_step(*args[:3], args[3][:6])
    with pytest.raises(TypeError, match="noise is torch.float64"):
        denoise_step(*args[:2], args[2].double(), args[3])


@each_dtype
@pytest.mark.parametrize("shape", [(), (3, 5), (2, 3, 31), (1025,)], ids=str)
def test_mish(variant, dtype, shape):
    x, grad = (torch.randn(shape).to(variant.device, dtype) for _ in range(2))
    results = []
    for values, g, backend in (
        (x * 3, grad, variant.backend),
        (x * 3, grad, "reference"),
        ((x * 3).double(), grad.double(), "reference"),
    ):
        leaf = values.clone().requires_grad_()
        out = mish(leaf, backend=backend)
        results.append((out.detach(), torch.autograd.grad(out, leaf, g)[0]))
    for name, a, e, r in zip(("out", "grad"), *results, strict=True):
        assert_accurate(name, a, e, r)


@triton
def test_mish_of_large_values_and_nan(variant, dtype):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([20.0, 21, 100, 3e38, inf, nan, -20, -100, -inf], device=variant.device)
    leaf = x.clone().requires_grad_()
    out = mish(leaf, backend=variant.backend)
    slope = torch.autograd.grad(out, leaf, torch.ones_like(x))[0]
    assert torch.equal(out[:5], x[:5]) and slope[:5].eq(1).all()
    right = reference.mish(x.double())
    # down to denormal numbers, of which 1.5e-36 is a few
    torch.testing.assert_close(out[6:8].double(), right[6:8], rtol=1e-5, atol=1.5e-36)
    assert out.isnan().nonzero().flatten().tolist() == [5, 8]
    assert slope.isnan().nonzero().flatten().tolist() == [5, 8]


def calls(device):
    """Every Triton operator of this file with small arguments."""
    args = cell(2, 9, 2, 3, 2, torch.float32, device)
    order = ("x", "idx", "table", "action", "w_a", "bias", "gain", "shift")
    logits, uniform = torch.randn(3, 5, device=device), torch.rand(3, device=device)
    x = torch.randn(2, 3, device=device)
    return {
        "onehot_ln_elu": [*(args[k] for k in order), 1e-3],
        "sample_categorical": [logits, uniform, 1.0, 0.1, True, True],
        "denoise_step": [*step_arguments(2, 5, device), 3.0],
        "mish_fwd": [x],
        "mish_bwd": [x, x],
    }


@triton
@pytest.mark.parametrize("name", calls("cpu"))
def test_opcheck(variant, dtype, name):
    operator = getattr(torch.ops.diwa, f"{name}_triton").default
    torch.library.opcheck(operator, calls(variant.device)[name])


@triton
def test_empty_and_strided(variant, dtype):
    args = cell(0, 9, 2, 3, 2, dtype, variant.device)
    assert onehot_ln_elu(**args, backend=variant.backend).shape == (0, 9)
    args = cell(3, 10, 2, 4, 3, dtype, variant.device)
    strided = {
        k: v.t().contiguous().t() if v is not None and v.dim() == 2 else v for k, v in args.items()
    }
    assert torch.equal(
        onehot_ln_elu(**strided, backend=variant.backend),
        onehot_ln_elu(**args, backend=variant.backend),
    )
    none = torch.empty(0, 4, device=variant.device)
    assert sample_categorical(none, none[:, 0], backend=variant.backend).shape == (0,)
    steps = step_arguments(0, 4, variant.device)
    assert denoise_step(*steps, backend=variant.backend)[0].shape == (0, 4)


@triton
def test_compiles_in_one_graph(variant, dtype):
    torch._dynamo.reset()
    args = cell(2, 9, 2, 3, 2, dtype, variant.device)
    uniform = torch.rand(2, 3, device=variant.device)

    def step(a):
        y = onehot_ln_elu(**a, backend=variant.backend)
        return sample_categorical(
            mish(y, backend=variant.backend).view(2, 3, 3), uniform, backend=variant.backend
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(args), step(args))
