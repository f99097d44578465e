"""rssm_imagine and FrozenRSSM against the reference, class by class and in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from optest import assert_accurate, variants

import diwa.nn
from diwa.nn.rssm import RSSMState
from diwa.ops import BackendError, RSSMWeights, pack_rssm, reference, rssm_imagine, use_backend

CPU = [case for case in variants() if case.id.startswith("cpu")]
each_isa = pytest.mark.parametrize("variant, dtype", CPU, indirect=["variant"])
# L, N, A, H, U, S, C: odd widths, one dream, more dreams than a tile, one class, one group
SHAPES = [
    (4, 3, 7, 8, 10, 3, 5),
    (2, 1, 1, 33, 31, 1, 19),
    (3, 131, 2, 16, 9, 4, 8),
    (1, 6, 3, 40, 300, 11, 1),
]


def arguments(L=4, N=3, A=7, H=8, U=10, S=3, C=5):
    """Weights, then h, z_idx, actions, uniforms."""
    shapes = [(U, S * C), (U,), (U, A), (U,), (U,), (3 * H, U), (3 * H, H), (3 * H,), (3 * H,)]
    shapes += [(U, H), (U,), (U,), (U,), (S * C, U), (S * C,)]
    w = [torch.randn(s) * (s[-1] ** -0.5 if len(s) > 1 else 0.5) for s in shapes]
    given = [torch.randn(N, H), torch.randint(C, (N, S)), torch.randn(L, N, A)]
    return RSSMWeights(*w), [*given, torch.rand(L, N, S)]


def wide(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors if t is not None]


def compare(w, given, backend, **kwargs):
    """h to the accuracy of eager torch, the same classes, and features of both."""
    h, z, features = rssm_imagine(
        pack_rssm(w), *given, return_features=True, backend=backend, **kwargs
    )
    eager = rssm_imagine(pack_rssm(w), *given, backend="reference", **kwargs)
    right = rssm_imagine(
        pack_rssm(RSSMWeights(*wide(w))), *wide(given), backend="reference", **kwargs
    )
    assert z.dtype == torch.int64 and torch.equal(z, right[1])  # no uniform is at an edge here
    assert_accurate("h", h, eager[0], right[0])
    assert torch.equal(features, reference.rssm_features(h, z, len(w.out) // z.shape[-1]))


@each_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_states(variant, dtype, shape):
    compare(*arguments(*shape), variant.backend)


@each_isa
@pytest.mark.parametrize("temperature, unimix", [(0.5, 0.0), (3.0, 0.0), (1.0, 0.3), (0.7, 1.0)])
def test_temperature_and_unimix(variant, dtype, temperature, unimix):
    w, given = arguments(N=40, S=5, C=9)
    compare(w, given, variant.backend, temperature=temperature, unimix=unimix, eps=1e-2)


@each_isa
def test_one_step_is_that_of_the_module(variant, dtype):
    model = diwa.nn.RSSM(7, 5, 12, 3, 4, 10, unimix=0.01)
    _, (h, z_idx, actions, uniforms) = arguments(L=5, N=6, H=12, C=4)
    frozen = model.freeze()
    with torch.no_grad():
        hs, zs, _ = frozen.imagine(h, z_idx, actions, uniforms, backend=variant.backend)
        state = RSSMState(h, F.one_hot(z_idx, 4).float().flatten(1))
        for i in range(5):
            state = model.imagine(state, actions[i], uniforms[i])
            # float32 sums of up to a few hundred terms in another order
            torch.testing.assert_close(hs[i], state.h, rtol=0, atol=1e-5)
            assert torch.equal(F.one_hot(zs[i], 4).float().flatten(1), state.z)


@each_isa
def test_inverse_cdf_at_its_edges(variant, dtype):
    """Logits come from the output bias alone: p = 0.7, 0.2, 0.1, and a class that is impossible."""
    w, (h, z_idx, actions, _) = arguments(L=1, N=5, S=2, C=3)
    logits = torch.tensor([0.7, 0.2, 0.1, 0.0, 1.0, 0.0]).log()
    w = w._replace(out=torch.zeros_like(w.out), out_bias=logits)
    uniforms = torch.tensor([0.0, 0.69, 0.71, 0.91, 1 - 2**-24])[None, :, None].expand(1, 5, 2)
    given = (h, z_idx, actions, uniforms)
    z = rssm_imagine(pack_rssm(w), *given, backend=variant.backend)[1]
    assert z[0].T.tolist() == [[0, 0, 1, 2, 2], [1, 1, 1, 1, 1]]
    hot = rssm_imagine(pack_rssm(w), *given, temperature=1e-3, backend=variant.backend)[1]
    assert not hot[..., 0].any()
    mixed = rssm_imagine(pack_rssm(w), *given, unimix=1.0, backend=variant.backend)[1]
    assert mixed[0].T.tolist() == [[0, 2, 2, 2, 2]] * 2


@each_isa
def test_bfloat16_is_as_close_as_rounding(variant, dtype):
    w, given = arguments(L=1, N=70, H=41, U=37, S=4, C=7)
    near = rssm_imagine(pack_rssm(w, torch.bfloat16), *given, backend=variant.backend)
    right = rssm_imagine(pack_rssm(w), *given, backend=variant.backend)
    assert not torch.equal(near[0], right[0])
    # 2^-9 of sums of size one, halved by the slopes of the gates, largest of 2870
    assert (near[0] - right[0]).abs().max() < 0.02
    assert (near[1] != right[1]).float().mean() < 0.02


@each_isa
def test_bfloat16_is_the_rounded_arithmetic(variant, dtype):
    """Large matrices rounded, and the activations before them: the reference on rounded weights
    differs by the rounding of activations only, so by less than the test above allows."""
    w, given = arguments(L=1, N=33, H=40, U=24, S=3, C=8)
    names = ("w_ih", "w_hh", "head_h", "out")
    rounded = w._replace(**{n: getattr(w, n).bfloat16().float() for n in names})
    near = rssm_imagine(pack_rssm(w, torch.bfloat16), *given, backend=variant.backend)[0]
    same = rssm_imagine(pack_rssm(rounded, torch.bfloat16), *given, backend=variant.backend)[0]
    assert torch.equal(near, same)


@each_isa
@pytest.mark.parametrize("where", ["h", "action", "out", "index"])
def test_nan_comes_out(variant, dtype, where):
    w, given = arguments(L=3, N=4)
    if where == "h":
        given[0][1, 2] = torch.nan
    elif where == "action":
        given[2][1, 1, 0] = torch.nan
    elif where == "out":
        w.out_bias[6] = torch.nan  # group 1
    else:
        given[1][1, 2] = -1
    results = [
        rssm_imagine(pack_rssm(w), *given, return_features=True, backend=b)
        for b in (variant.backend, "reference")
    ]
    assert results[1][2].isnan().any() and (results[1][1] == -1).any()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(results[0][1], results[1][1])


@each_isa
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)], ids=str)
def test_empty(variant, dtype, shape):
    w, given = arguments(*shape)
    for backend in (variant.backend, "reference"):
        h, z, f = rssm_imagine(pack_rssm(w), *given, return_features=True, backend=backend)
        assert h.shape == (*shape, 8) and z.shape == (*shape, 3) and f.shape == (*shape, 23)
        assert rssm_imagine(pack_rssm(w), *given, backend=backend)[2] is None


@each_isa
def test_non_contiguous_and_int32(variant, dtype):
    w, given = arguments()
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in given]
    strided[1] = strided[1].int()
    w2 = RSSMWeights(*(t if t is None or t.dim() < 2 else t.t().contiguous().t() for t in w))
    a = rssm_imagine(pack_rssm(w), *given, backend=variant.backend)
    b = rssm_imagine(pack_rssm(w2), *strided, backend=variant.backend)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@each_isa
def test_dreams_are_independent_and_deterministic(variant, dtype):
    """A dream does not depend on the batch it is in, whatever tile it falls into."""
    w, given = arguments(N=150)
    whole = rssm_imagine(pack_rssm(w), *given, backend=variant.backend)
    h, z_idx, actions, uniforms = given
    part = (h[70:75], z_idx[70:75], actions[:, 70:75], uniforms[:, 70:75])
    alone = rssm_imagine(pack_rssm(w), *part, backend=variant.backend)
    # register tiles of other heights; h lies in (-1, 1)
    torch.testing.assert_close(whole[0][:, 70:75], alone[0], rtol=0, atol=1e-6)
    assert torch.equal(whole[1][:, 70:75], alone[1])
    again = rssm_imagine(pack_rssm(w), *given, backend=variant.backend)
    assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])


def native_arguments(w, given):
    p = pack_rssm(w)
    vectors = [w.cell_bias, w.cell_gain, w.cell_shift, w.b_ih, w.b_hh]
    vectors += [w.head_bias, w.head_gain, w.head_shift, w.out_bias]
    return [*given, p.table, p.cell_a, list(p.packed), vectors, 1.0, 0.0, 1e-3, True]


@each_isa
def test_opcheck(variant, dtype):
    torch.library.opcheck(torch.ops.diwa.rssm_imagine.default, native_arguments(*arguments()))


@each_isa
@pytest.mark.parametrize("which", range(6))
def test_native_operator_refuses_wrong_shapes(variant, dtype, which):
    args = native_arguments(*arguments())
    for spoil in (lambda t: t[..., :-1], lambda t: t[0], lambda t: t.bool()):
        spoiled = list(args)
        spoiled[which] = spoil(args[which])
        with pytest.raises(RuntimeError, match="rssm_imagine: "):
            torch.ops.diwa.rssm_imagine.default(*spoiled)
    for place in (6, 7):
        for i in range(len(args[place])):
            spoiled = [t[:-1] if i == k else t for k, t in enumerate(args[place])]
            with pytest.raises(RuntimeError, match="rssm_imagine: "):
                torch.ops.diwa.rssm_imagine.default(*args[:place], spoiled, *args[place + 1 :])


@each_isa
def test_compiles_in_one_graph(variant, dtype):
    w, given = arguments()
    p = pack_rssm(w)
    torch._dynamo.reset()

    def dream(h, z_idx, actions, uniforms):
        out = rssm_imagine(p, h, z_idx, actions, uniforms, backend=variant.backend)
        return out[0].sin(), out[1]

    compiled = torch.compile(dream, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(dream(*given), compiled(*given), strict=True))


BAD = {
    "h must be": (0, lambda t: t[:, 1:]),
    "h must be floating": (0, lambda t: t.long()),
    "z_idx must be": (1, lambda t: t[:, 1:]),
    "z_idx must be int64": (1, lambda t: t.float()),
    "z_idx holds 5": (1, lambda t: t * 0 + 5),
    "z_idx holds -2": (1, lambda t: t * 0 - 2),
    "actions must be": (2, lambda t: t[0]),
    "uniforms must be": (3, lambda t: t[..., :2]),
    "uniforms is on meta": (3, lambda t: t.to("meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_argument_is_named(message):
    w, given = arguments()
    which, spoil = BAD[message]
    given[which] = spoil(given[which])
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        rssm_imagine(pack_rssm(w), *given)


def test_bad_options_and_forced_backends():
    w, given = arguments()
    with pytest.raises(ValueError, match="temperature must be positive"):
        rssm_imagine(pack_rssm(w), *given, temperature=0.0)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        pack_rssm(w, torch.float16)
    with pytest.raises(BackendError, match="takes float32, not float64"):
        rssm_imagine(pack_rssm(RSSMWeights(*wide(w))), *wide(given), backend="cpu")
    with pytest.raises(BackendError, match="needs float32 weights on the CPU"):
        rssm_imagine(pack_rssm(RSSMWeights(*wide(w))), *given, backend="cpu")


def change_in_place(model):
    with torch.no_grad():
        model.gru.weight_hh.mul_(0.5)


def change_by_optimizer(model):
    model.prior_logits(torch.ones(2, 8)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()


def change_by_loading(model):
    model.load_state_dict(diwa.nn.RSSM(7, 5, 8, 3, 5, 10).state_dict())


def replace_parameter(model):
    model.prior_out.bias = torch.nn.Parameter(torch.randn(15))


def replace_data(model):
    model.cell_norm.weight.data = torch.rand(10)


def change_and_refresh(model):
    model.cell_z.weight.data.mul_(0.5)
    model.test_frozen.refresh()


CHANGES = [
    change_in_place,
    change_by_optimizer,
    change_by_loading,
    replace_parameter,
    replace_data,
    change_and_refresh,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_frozen_follows_its_model(change):
    model = diwa.nn.RSSM(7, 5, 8, 3, 5, 10)
    _, given = arguments()
    frozen = model.freeze()
    object.__setattr__(model, "test_frozen", frozen)
    before = frozen.imagine(*given)[0]
    packed = frozen.packed()
    assert frozen.packed() is packed  # nothing is packed twice
    change(model)
    after = frozen.imagine(*given)[0]
    assert not torch.equal(before, after)
    assert torch.equal(after, model.freeze().imagine(*given)[0])
    with use_backend("reference"):
        torch.testing.assert_close(frozen.imagine(*given)[0], after, rtol=0, atol=1e-5)


def test_frozen_of_parameters_without_versions():
    """Made in inference mode they keep no version counter: packed anew each time."""
    with torch.inference_mode():
        model = diwa.nn.RSSM(7, 5, 8, 3, 5, 10)
        frozen = model.freeze()
        _, given = arguments()
        before = frozen.imagine(*given)[0]
        model.gru.weight_hh.mul_(0.5)
        assert not torch.equal(before, frozen.imagine(*given)[0])


def test_frozen_copies_and_leaves_the_state_dict_alone():
    model = diwa.nn.RSSM(7, 5, 8, 3, 5, 10)
    keys = list(model.state_dict())
    frozen = model.freeze()
    assert list(model.state_dict()) == keys
    _, given = arguments()
    twin = copy.deepcopy(frozen)
    assert torch.equal(twin.imagine(*given)[0], frozen.imagine(*given)[0])
    change_in_place(model)
    assert not torch.equal(twin.imagine(*given)[0], frozen.imagine(*given)[0])
    half = model.freeze(torch.bfloat16)
    assert not torch.equal(half.imagine(*given)[0], frozen.imagine(*given)[0])
    assert not frozen.imagine(*given)[0].requires_grad
    double = copy.deepcopy(model).double().freeze()
    assert double.imagine(*wide(given))[0].dtype == torch.float64


def test_frozen_follows_its_model_under_compile():
    model = diwa.nn.RSSM(7, 5, 8, 3, 5, 10)
    _, given = arguments()
    frozen = model.freeze()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: frozen.imagine(*a)[0].sin(), backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(*given), frozen.imagine(*given)[0].sin())
        change_in_place(model)
