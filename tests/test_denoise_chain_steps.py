"""denoise_chain_steps: the chain by single steps against the reference, and when it is chosen."""

import sys

import pytest
import torch
from optest import assert_accurate, variants
from test_denoise_chain import CASES, Case, widen

from diwa.config import PolicyConfig
from diwa.nn.diffusion import DiffusionPolicy
from diwa.ops import denoise_chain, denoise_step, registry
from diwa.ops import reference_chain as reference
from diwa.ops.denoise_chain_steps import denoise_chain_steps

TRITON = [case for case in variants() if case.id.startswith("triton")]
triton = pytest.mark.parametrize("variant, dtype", TRITON, indirect=["variant"])


def to(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        fields = [to(v, device) for v in value]
        return type(value)(*fields) if hasattr(value, "_fields") else tuple(fields)
    return value


def arguments(case, device="cpu"):
    h, z, noise = case.inputs()
    nets = case.network(0), case.network(1 if case.base else 0)
    feature = reference.one_hot_feature(h, z, case.S * case.C)
    return to((*nets, feature, noise, case.steps()), device)


@triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_chain_of_steps_is_the_reference(variant, dtype, case):
    args = arguments(case, variant.device)
    rest = case.Kf, 3.0
    actual = denoise_chain_steps(*args, *rest, backend=variant.backend)
    eager = reference.denoise_chain(*args, *rest)
    right = reference.denoise_chain(*(widen(a) for a in args), *rest)
    for name in actual._fields:
        assert_accurate(name, *(getattr(c, name) for c in (actual, eager, right)))


@triton
def test_operator_takes_both_forms_of_the_condition(variant, dtype):
    case = Case(5)
    tuned, base, feature, noise, steps = arguments(case, variant.device)
    h, z, _ = to(Case(5).inputs(), variant.device)
    feature = reference.one_hot_feature(h, z, case.S * case.C)
    how = {"base": base, "ft_steps": 2, "backend": variant.backend}
    a = denoise_chain(tuned, noise, steps, feature=feature, **how)
    b = denoise_chain(tuned, noise, steps, h=h, z_idx=z, **how)
    assert all(map(torch.equal, a, b))


def test_every_step_ends_in_one_operator(monkeypatch):
    case, calls = Case(4, Kf=2), []
    module = sys.modules["diwa.ops.denoise_chain_steps"]
    monkeypatch.setattr(
        module, "denoise_step", lambda *a, **k: calls.append(1) or denoise_step(*a, **k)
    )
    denoise_chain_steps(*arguments(case), case.Kf, 3.0)
    assert len(calls) == case.K


@pytest.mark.parametrize(
    "frozen, width, chosen",
    [("float32", 256, "steps"), ("bfloat16", 256, "cluster"), ("bfloat16", 96, "steps")],
)
def test_what_a_gpu_samples_with(monkeypatch, frozen, width, chosen):
    """The cluster kernel where it can, single steps elsewhere; as if this were a GPU with both."""
    module, seen = sys.modules["diwa.ops.denoise_chain"], []
    ready = tuple(
        registry.Variant(v.backend, ("cpu",), v.dtypes)
        for v in registry._ops["denoise_chain"]
        if v.backend != "cpu"
    )
    monkeypatch.setitem(registry._ops, "denoise_chain", ready)

    def sampled(name):
        def call(tuned, base, feature, noise, steps, *args, **kwargs):
            seen.append(name)
            return reference.denoise_chain(tuned, base, feature, noise, steps, 4, 3.0)

        return call

    monkeypatch.setattr(module.cluster, "denoise_chain_cluster", sampled("cluster"))
    monkeypatch.setattr(module, "denoise_chain_steps", sampled("steps"))
    policy = DiffusionPolicy(8, PolicyConfig(width=width)).requires_grad_(False)
    noise = policy.noise(2, torch.Generator())
    packed = policy.freeze(torch.float32, getattr(torch, frozen))
    packed.sample(torch.randn(2, 8), noise, ft_steps=4, explore=True)
    assert seen == [chosen]
