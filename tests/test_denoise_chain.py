"""denoise_chain: the native chain against its reference, and the packing of weights."""

import dataclasses

import pytest
import torch
from optest import CPU_ISAS, assert_accurate

from diwa.config import PolicyConfig
from diwa.nn.schedule import NoiseSchedule
from diwa.ops import BackendError, PackedNetwork, denoise_chain, pack_weight, step_table
from diwa.ops import reference_chain as reference
from diwa.ops.packing import packed_size
from diwa.ops.reference_chain import Network

OP = getattr(torch.ops.diwa, "denoise_chain", None)
CONFIG = PolicyConfig()
each_isa = pytest.mark.parametrize("variant", CPU_ISAS, indirect=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """Odd sizes around every width of vector, panel and block."""

    N: int
    P: int = 28
    W: int = 40
    H: int = 24
    S: int = 2
    C: int = 3
    K: int = 5
    Kf: int = 3
    layers: int = 2
    residual: bool = True
    base: bool = True

    def network(self, seed=0, dtype=torch.float32):
        g = torch.Generator().manual_seed(seed)

        def rand(*shape, scale=1.0):
            return (torch.randn(*shape, generator=g) * scale / shape[-1] ** 0.5).to(dtype)

        f = self.H + self.S * self.C
        hidden = tuple((rand(self.W, self.W, scale=1.5), rand(self.W)) for _ in range(self.layers))
        first = (rand(self.W, self.P), rand(self.W, f), rand(self.W), rand(self.K, self.W))
        return Network(*first, hidden, rand(self.P, self.W), rand(self.P), self.residual)

    def inputs(self):
        h, z = torch.randn(self.N, self.H), torch.randint(self.C, (self.N, self.S))
        return h, z, torch.randn(self.K + 1, self.N, self.P)

    def steps(self):
        return NoiseSchedule(self.K).tables(CONFIG, explore=True)


CASES = [
    Case(6),
    Case(1, W=64, H=257),
    Case(3, P=7, W=33, H=600, S=3, C=4, Kf=5, layers=0),
    Case(90, P=5, W=31, H=7, Kf=0, layers=4),
    Case(37, P=9, W=37, H=11, S=1, C=6, layers=3, residual=False),
    Case(2, P=33, W=1, H=1, S=1, C=1, layers=1, residual=False, Kf=1),
    Case(14, W=300, H=5, base=False),
    Case(5, P=1, K=1, Kf=1, layers=0, residual=False),
]


def widen(value):
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, tuple):
        fields = [widen(v) for v in value]
        return type(value)(*fields) if hasattr(value, "_fields") else tuple(fields)
    return value


def run(case, nets, condition, noise, backend, dtype=torch.float32):
    tuned, base = nets
    if backend != "reference":
        tuned, base = PackedNetwork(tuned, dtype), PackedNetwork(base, dtype)
    return denoise_chain(
        tuned,
        noise,
        case.steps() if noise.dtype == torch.float32 else widen(case.steps()),
        base=base if case.base else None,
        ft_steps=case.Kf,
        backend=backend,
        **condition,
    )


@each_isa
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chain_is_the_reference(variant, case):
    h, z, noise = case.inputs()
    nets = case.network(0), case.network(1)
    feature = reference.one_hot_feature(h, z, case.S * case.C)
    eager = run(case, nets, {"feature": feature}, noise, "reference")
    right = run(case, widen(nets), {"feature": feature.double()}, noise.double(), "reference")
    for condition in ({"feature": feature}, {"h": h, "z_idx": z}):
        actual = run(case, nets, condition, noise, variant.backend)
        for name in actual._fields:
            assert_accurate(name, *(getattr(c, name) for c in (actual, eager, right)))


@each_isa
def test_bfloat16_is_the_reference_with_rounded_inputs(variant, monkeypatch):
    """The reference with the inputs of every product rounded to bfloat16. What is left: sums in
    another order, and now and then an activation that they round the other way."""
    case = Case(20, P=7, W=45, H=301)
    h, z, noise = case.inputs()
    nets = case.network(0), case.network(1)
    condition = {"h": h, "z_idx": z}
    actual = run(case, nets, condition, noise, variant.backend, torch.bfloat16)
    exact = run(case, nets, condition, noise, "reference")
    linear = reference.F.linear

    def rounded(x, w, b=None):
        return linear(x.bfloat16().float(), w.bfloat16().float(), b)

    monkeypatch.setattr(reference.F, "linear", rounded)
    right = run(case, nets, condition, noise, "reference")

    def error(a, b):
        return (a.chain - b.chain).square().mean().sqrt()

    assert error(actual, right) < 0.25 * error(exact, right)
    assert error(actual, exact) > 1e-4, "bfloat16 was not used"
    # both read them off the same noise, in float32
    torch.testing.assert_close(actual.log_prob, right.log_prob, rtol=0, atol=1e-5)


@each_isa
def test_rows_do_not_depend_on_their_batch(variant):
    """To rounding: the number of rows decides how K is summed."""
    case = Case(100)
    h, z, noise = case.inputs()
    nets = case.network(0), case.network(1)
    whole = run(case, nets, {"h": h, "z_idx": z}, noise, variant.backend)
    for rows in (slice(0, 1), slice(50, 57)):
        part = {"h": h[rows], "z_idx": z[rows]}
        alone = run(case, nets, part, noise[:, rows], variant.backend)
        # float32 sums of up to a few hundred terms in another order
        torch.testing.assert_close(alone.chain, whole.chain[rows], rtol=0, atol=1e-5)
    again = run(case, nets, {"h": h, "z_idx": z}, noise, variant.backend)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@each_isa
def test_threads_give_the_same_chain(variant):
    case = Case(100)
    h, z, noise = case.inputs()
    nets = case.network(0), case.network(1)
    one = run(case, nets, {"h": h, "z_idx": z}, noise, variant.backend)
    torch.set_num_threads(3)
    try:
        three = run(case, nets, {"h": h, "z_idx": z}, noise, variant.backend)
    finally:
        torch.set_num_threads(1)
    # float32 sums of up to a few hundred terms in another order
    torch.testing.assert_close(three.chain, one.chain, rtol=0, atol=1e-5)


@each_isa
@pytest.mark.parametrize("where", ["feature", "noise", "weight", "bias"])
def test_nan_comes_out(variant, where):
    case = Case(7, S=1, C=1)
    feature, _, noise = torch.randn(7, case.H + 1), None, torch.randn(6, 7, 28)
    net = case.network()
    if where == "feature":
        feature[3, -1] = float("nan")
    elif where == "noise":
        noise[0, 3, 5] = float("nan")
    elif where == "weight":
        net.hidden[1][0][4, 4] = float("nan")
    else:
        net.out_bias[2] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        out = run(case, (net, net), {"feature": feature}, noise, variant.backend, dtype)
        right = run(case, (net, net), {"feature": feature}, noise, "reference")
        for a, b in zip(out, right, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
        assert out.chunk.isnan().any()


@each_isa
def test_clipped_noise_and_infinities(variant):
    case = Case(4)
    h, z, noise = case.inputs()
    noise[2:, 0] = 1e30
    noise[3, 1] = float("-inf")
    nets = case.network(0), case.network(1)
    actual, right = (
        run(case, nets, {"h": h, "z_idx": z}, noise, b) for b in (variant.backend, "reference")
    )
    for a, b in zip(actual, right, strict=True):
        # the first step amplifies rounding by q = 103
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@each_isa
def test_deterministic_steps(variant):
    """A deviation of zero: the step's noise plays no part."""
    case = Case(5, base=False)
    h, z, noise = case.inputs()
    net = case.network()
    steps = case.steps()._replace(std=torch.zeros(case.K))
    results = []
    for n in (noise, torch.cat([noise[:1], noise[1:] * 2])):
        results.append(denoise_chain(net, n, steps, h=h, z_idx=z, backend=variant.backend).chunk)
    assert torch.equal(*results)


@each_isa
def test_empty_batch_and_non_contiguous(variant):
    case = Case(8)
    h, z, noise = case.inputs()
    nets = case.network(0), case.network(1)
    right = run(case, nets, {"h": h, "z_idx": z}, noise, variant.backend)
    strided = {"h": h.t().contiguous().t(), "z_idx": z.t().contiguous().t()}
    actual = run(case, nets, strided, noise.transpose(1, 2).contiguous().transpose(1, 2), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(actual, right, strict=True))
    empty = run(case, nets, {"h": h[:0], "z_idx": z[:0]}, noise[:, :0], variant.backend)
    assert [t.shape for t in empty] == [(0, 28), (0, 4, 28), (0, 3, 28)]


def native_arguments(case):
    h, z, noise = case.inputs()
    tensors = [PackedNetwork(case.network(i)).tensors(case.H) for i in (0, 1)]
    return [noise, h, z, *tensors, step_table(case.steps()), 2, case.Kf, 3.0, case.residual]


@each_isa
def test_opcheck(variant):
    args = native_arguments(Case(3))
    torch.library.opcheck(OP.default, tuple(args))
    args[7] = 0
    torch.library.opcheck(OP.default, tuple(args))


@each_isa
def test_compiles_in_one_graph(variant):
    args = native_arguments(Case(3))
    torch._dynamo.reset()

    def step(noise, h):
        chunk, chain, log_prob = torch.ops.diwa.denoise_chain(noise, h, *args[2:])
        return chunk.sin(), chain, log_prob

    eager = step(args[0], args[1])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(args[0], args[1])
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def changed(index, value):
    def change(args):
        args[index] = value(args[index]) if callable(value) else value

    return change


def in_net(index, value):
    def change(args):
        args[4] = list(args[4])
        args[4][index] = value(args[4][index])

    return change


REFUSED = {
    "noise of another dtype": (changed(0, lambda t: t.double()), "noise must be float32"),
    "noise of two dimensions": (changed(0, lambda t: t[0]), "noise must be float32"),
    "no step": (changed(0, lambda t: t[:1]), "needs a step"),
    "another batch": (changed(1, lambda t: t[:2]), "with the N of noise"),
    "condition of another size": (changed(1, lambda t: t[:, :5]), "tuned.cond_in must be"),
    "indices of another dtype": (changed(2, lambda t: t.int()), "z_idx must be int64"),
    "index too large": (changed(2, lambda t: t + 3), r"z_idx must lie in \[0, 3\)"),
    "index negative": (changed(2, lambda t: t - 3), r"z_idx must lie in \[0, 3\)"),
    "no network": (changed(4, []), "6 tensors and 2 per hidden layer"),
    "another depth": (changed(3, lambda t: t[:-2]), "base as many as tuned"),
    "steps": (changed(5, lambda t: t[:, :6]), r"steps must be float32 \[K, 7\]"),
    "ft_steps": (changed(7, 6), "ft_steps must lie"),
    "base_steps": (changed(6, -1), "base_steps must lie"),
    "a weight of another size": (in_net(4, lambda t: t[:-1]), "tuned.hidden must be"),
    "a weight of another dtype": (in_net(4, lambda t: t.bfloat16()), "tuned.hidden must be"),
    "weights in half": (in_net(0, lambda t: t.half()), "packed as float32 or bfloat16"),
    "a table of another size": (in_net(2, lambda t: t[:-1]), "table"),
    "a bias of another size": (in_net(5, lambda t: t[:-1]), "tuned.hidden_bias must be"),
    "an output bias strided": (in_net(-1, lambda t: t.repeat(2)[::2]), "contiguous"),
}


@each_isa
@pytest.mark.parametrize("reason", REFUSED)
def test_operator_refuses_wrong_arguments(variant, reason):
    change, message = REFUSED[reason]
    args = native_arguments(Case(3))
    change(args)
    with pytest.raises(RuntimeError, match=message):
        OP(*args)


def test_function_refuses_wrong_arguments():
    case = Case(3)
    h, z, noise = case.inputs()
    net, steps = case.network(), case.steps()
    feature = torch.randn(3, 30)
    for kwargs, message in [
        ({}, "either feature, or h and z_idx"),
        ({"feature": feature, "h": h, "z_idx": z}, "either feature, or h and z_idx"),
        ({"h": h}, "either feature, or h and z_idx"),
        ({"feature": feature[:, :9]}, r"feature must be \[N, 30\], got \[3, 9\]"),
        ({"feature": feature[:2]}, r"noise must be \[K \+ 1, N, P\] = \[6, 2, 28\]"),
        ({"feature": feature.double()}, "cond is torch.float64"),
        ({"h": h, "z_idx": z.int()}, r"z_idx must be int64 \[3, S\]"),
        ({"h": h[:, :-1], "z_idx": z}, "do not make a feature of 30"),
        ({"feature": feature, "ft_steps": 6}, r"ft_steps must lie in \[0, 5\], got 6"),
        ({"feature": feature, "base": Case(3, W=41).network()}, "base.chunk_in is"),
        ({"feature": feature, "base": Case(3, layers=4).network()}, "one kind and depth"),
    ]:
        with pytest.raises(ValueError, match=message):
            denoise_chain(net, noise, steps, **kwargs)
    with pytest.raises(BackendError, match="takes float32, not float64|not built"):
        wide = widen(net)
        denoise_chain(wide, noise.double(), steps, feature=feature.double(), backend="cpu")
    with pytest.raises(ValueError, match="unknown backend 'tritom'"):
        denoise_chain(net, noise, steps, feature=feature, backend="tritom")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 4), (33, 7), (64, 2)])
def test_packed_layout(dtype, n, k):
    """The layout written down in gemm.h."""
    weight = torch.randn(n, k)
    packed = pack_weight(weight, dtype)
    assert packed.dtype == dtype and packed.shape == (packed_size(n, k, dtype),)
    pair = 1 if dtype == torch.float32 else 2
    panels = packed.view(-1, (k + pair - 1) // pair, 16, pair)
    assert len(panels) % 2 == 0
    for i in range(n):
        for j in range(k):
            assert panels[i // 16, j // pair, i % 16, j % pair] == weight[i, j].to(dtype)
    assert packed.count_nonzero() == n * k


def test_packing_refuses():
    with pytest.raises(ValueError, match=r"must be \[N, K\] on the CPU, got \[3\]"):
        pack_weight(torch.zeros(3))
    with pytest.raises(TypeError, match="float32 or bfloat16, got torch.float16"):
        pack_weight(torch.zeros(3, 3), torch.float16)
