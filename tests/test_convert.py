"""Checkpoints of LUMOS, DiWA and DPPO: both ways, and every block against its equations.

The functions named `ref_*` state the method's equations (sections 1 to 5) in plain torch on a dict
of tensors under the original's names. They share no code with `diwa`. Everything is compared in
float64, where the two agree to rounding unless a table of ours is kept in float32.
"""

import math
import os
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from diwa import cli
from diwa.agent import load_classifier, load_policy
from diwa.convert import convert_checkpoint, export_checkpoint, load_vision_world_model
from diwa.errors import CheckpointError
from diwa.nn.diffusion import DiffusionPolicy
from diwa.nn.heads import Critic, RewardClassifier
from diwa.nn.rssm import RSSMState, balanced_kl
from diwa.nn.vision import VisionConfig, VisionWorldModel, picture_input
from diwa.rl.ppo import chunk_log_prob, clip_schedule, denoising_discount, ppo_loss

A, HID, DET, S, C, DEPTH, PROPRIO = 7, 10, 12, 3, 4, 2, 5
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64 rounding of a few hundred operations
TABLE = {"rtol": 0, "atol": 2e-5}  # q is up to 406 and kept in float32 (6e-8): 406 * 6e-8


# ---- checkpoints as the originals write them -----------------------------------------------------


def linear(name: str, rows: int, columns: int, bias: bool = True) -> dict[str, torch.Tensor]:
    tensors = {f"{name}.weight": torch.randn(rows, columns) / math.sqrt(columns)}
    return tensors | ({f"{name}.bias": 0.3 * torch.randn(rows)} if bias else {})


def norm(name: str, size: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": 1 + 0.2 * torch.randn(size), f"{name}.bias": 0.2 * torch.randn(size)}


def lumos(action_dim: int = A, cameras: int = 2) -> dict[str, torch.Tensor]:
    """State dict of a small LUMOS vision world model."""
    cell, image, feature = "rssm_core.cell.", 32 * DEPTH, DET + S * C
    w: dict[str, torch.Tensor] = {}
    for camera in ("static", "gripper")[:cameras]:
        channels = [3, DEPTH, 2 * DEPTH, 4 * DEPTH, 8 * DEPTH]
        for i in range(4):
            name = f"encoder.encoder_{camera}.{2 * i}"
            w[f"{name}.weight"] = torch.randn(channels[i + 1], channels[i], 4, 4) / (
                4 * channels[i] ** 0.5
            )
            w[f"{name}.bias"] = 0.3 * torch.randn(channels[i + 1])
        w |= linear(f"decoder.decoder_{camera}.0", image, feature)
        channels = [image, 4 * DEPTH, 2 * DEPTH, DEPTH, 3]
        for i, k in enumerate((5, 5, 6, 6)):
            name = f"decoder.decoder_{camera}.{2 * i + 2}"
            w[f"{name}.weight"] = torch.randn(channels[i], channels[i + 1], k, k) / k
            w[f"{name}.bias"] = 0.3 * torch.randn(channels[i + 1])
    if cameras == 2:
        w |= linear("encoder.fuse.0", image, 2 * image) | norm("encoder.fuse.1", image)
    w |= {f"{cell}init_h": torch.randn(DET), f"{cell}init_z": torch.randn(S * C)}
    w |= linear(f"{cell}z_mlp", HID, S * C) | linear(f"{cell}a_mlp", HID, action_dim, bias=False)
    w |= norm(f"{cell}in_norm", HID)
    for part, columns in (("ih", HID), ("hh", DET)):
        w[f"{cell}gru.layers.0.weight_{part}"] = torch.randn(3 * DET, columns) / columns**0.5
        w[f"{cell}gru.layers.0.bias_{part}"] = 0.3 * torch.randn(3 * DET)
    w |= linear(f"{cell}prior_mlp_h", HID, DET) | norm(f"{cell}prior_norm", HID)
    w |= linear(f"{cell}prior_mlp", S * C, HID)
    w |= linear(f"{cell}post_mlp_h", HID, DET)
    w |= linear(f"{cell}post_mlp_e", HID, image + PROPRIO, bias=False)
    w |= norm(f"{cell}post_norm", HID) | linear(f"{cell}post_mlp", S * C, HID)
    return w


def dppo(prefix: str, chunk: int = 4, cond: int = 9, width: int = 16) -> dict[str, torch.Tensor]:
    """State dict of one DiffusionMLP with a residual block."""
    layers, inputs = f"{prefix}.mlp_mean.layers", chunk * A + 16 + cond
    w = linear(f"{prefix}.time_embedding.1", 32, 16) | linear(f"{prefix}.time_embedding.3", 16, 32)
    w |= linear(f"{layers}.0", width, inputs) | linear(f"{layers}.1.l1", width, width)
    return w | linear(f"{layers}.1.l2", width, width) | linear(f"{layers}.2", chunk * A, width)


def dppo_critic(cond: int = 9, width: int = 6) -> dict[str, torch.Tensor]:
    layers = "critic.Q1.layers"
    w = linear(f"{layers}.0", width, cond) | linear(f"{layers}.1.l1", width, width)
    return w | linear(f"{layers}.1.l2", width, width) | linear(f"{layers}.2", 1, width)


def classifier(feature: int = 24, width: int = 12) -> dict[str, torch.Tensor]:
    w = linear("projector.0", width, feature) | linear("projector.2", 256, width)
    return w | linear("head.fc1", width, 256) | linear("head.fc2", 2, width)


def doubled(w: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in w.items()}


def same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


# ---- the equations -------------------------------------------------------------------------------


def ref_linear(w, name, x):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def ref_norm(w, name, x):
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / torch.sqrt(variance + 1e-3) * w[f"{name}.weight"] + w[f"{name}.bias"]


def ref_elu(x):
    return torch.where(x > 0, x, torch.exp(x) - 1)


def ref_mish(x):
    return x * torch.tanh(torch.log1p(torch.exp(x)))


def ref_encoder(w, pictures, proprio):
    """Section 1.2 for pictures `[B, 3, 64, 64]` of each camera."""
    embedded = []
    for camera, x in pictures.items():
        for i in range(4):
            name = f"encoder.encoder_{camera}.{2 * i}"
            x = ref_elu(F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2))
        assert x.shape[-2:] == (2, 2)
        embedded.append(x.reshape(len(x), -1))
    image = torch.cat(embedded, -1)
    if len(embedded) == 2:
        image = ref_elu(ref_norm(w, "encoder.fuse.1", ref_linear(w, "encoder.fuse.0", image)))
    return torch.cat([image, proprio], -1)


def ref_recur(w, h, s, a):
    """Section 1.3, first two lines and the GRU's gates."""
    cell = "rssm_core.cell."
    x = ref_linear(w, f"{cell}z_mlp", s) + ref_linear(w, f"{cell}a_mlp", a)
    x = ref_elu(ref_norm(w, f"{cell}in_norm", x))
    gates = f"{cell}gru.layers.0."
    xr, xu, xn = (x @ w[f"{gates}weight_ih"].T + w[f"{gates}bias_ih"]).split(DET, -1)
    hr, hu, hn = (h @ w[f"{gates}weight_hh"].T + w[f"{gates}bias_hh"]).split(DET, -1)
    r, u = torch.sigmoid(xr + hr), torch.sigmoid(xu + hu)
    n = torch.tanh(xn + r * hn)
    return (1 - u) * n + u * h


def ref_prior(w, h):
    cell = "rssm_core.cell."
    x = ref_elu(ref_norm(w, f"{cell}prior_norm", ref_linear(w, f"{cell}prior_mlp_h", h)))
    return ref_linear(w, f"{cell}prior_mlp", x)


def ref_posterior(w, h, e):
    cell = "rssm_core.cell."
    x = ref_linear(w, f"{cell}post_mlp_h", h) + ref_linear(w, f"{cell}post_mlp_e", e)
    return ref_linear(w, f"{cell}post_mlp", ref_elu(ref_norm(w, f"{cell}post_norm", x)))


def ref_sample(logits, uniform):
    """One-hot by inverse CDF: the class at which the cumulative probability passes `uniform`."""
    p = torch.exp(logits.reshape(-1, S, C))
    p = p / p.sum(-1, keepdim=True)
    onehot = torch.zeros_like(p)
    for b in range(len(p)):
        for g in range(S):
            total, k = 0.0, 0
            while k < C - 1 and total + p[b, g, k].item() <= uniform[b, g].item():
                total += p[b, g, k].item()
                k += 1
            onehot[b, g, k] = 1
    return onehot.reshape(-1, S * C)


def ref_decoder(w, camera, feature):
    """Section 1.4."""
    x = ref_linear(w, f"decoder.decoder_{camera}.0", feature)[..., None, None]
    for i in range(4):
        name = f"decoder.decoder_{camera}.{2 * i + 2}"
        x = F.conv_transpose2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=2)
        x = ref_elu(x) if i < 3 else x
    return x


def ref_schedule(K):
    """Section 3.2 in Python floats; dicts of lists over t."""
    bar = [
        math.cos((i * (K + 1) / K / (K + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
        for i in range(K + 1)
    ]
    out = {name: [] for name in ("beta", "bar", "sigma", "c1", "c2", "p", "q")}
    previous = 1.0
    for t in range(K):
        beta = min(max(1 - bar[t + 1] / bar[t], 0), 0.999)
        now = previous * (1 - beta)
        out["beta"].append(beta)
        out["bar"].append(now)
        out["sigma"].append(math.sqrt(max(beta * (1 - previous) / (1 - now), 1e-20)))
        out["c1"].append(beta * math.sqrt(previous) / (1 - now))
        out["c2"].append(math.sqrt(1 - beta) * (1 - previous) / (1 - now))
        out["p"].append(1 / math.sqrt(now))
        out["q"].append(math.sqrt(1 / now - 1))
        previous = now
    return out


def ref_noise(w, prefix, x, t, f):
    """Section 3.1: predicted noise for chunks `x [B, L * A]` at step t."""
    omega = [math.exp(-i * math.log(1e4) / 7) for i in range(8)]
    sinusoid = [math.sin(t * o) for o in omega] + [math.cos(t * o) for o in omega]
    tau = torch.tensor(sinusoid, dtype=x.dtype)
    tau = ref_mish(ref_linear(w, f"{prefix}.time_embedding.1", tau))
    tau = ref_linear(w, f"{prefix}.time_embedding.3", tau).expand(len(x), -1)
    layers = f"{prefix}.mlp_mean.layers"
    y = ref_linear(w, f"{layers}.0", torch.cat([x, tau, f], -1))
    inner = ref_linear(w, f"{layers}.1.l1", ref_mish(y))
    y = y + ref_linear(w, f"{layers}.1.l2", ref_mish(inner))
    return ref_linear(w, f"{layers}.2", y)


def ref_mean(w, prefix, x, t, f, s):
    x0 = (s["p"][t] * x - s["q"][t] * ref_noise(w, prefix, x, t, f)).clamp(-1, 1)
    return s["c1"][t] * x0 + s["c2"][t] * x


def ref_log_prob(w, prefix, chain, f, K, Kf):
    """Section 5.6: `chain [B, Kf + 1, L * A]` -> `[B, Kf, L * A]`."""
    s, rows = ref_schedule(K), []
    for j in range(Kf):
        t = Kf - 1 - j
        std = max(s["sigma"][t], 0.1)
        mean = ref_mean(w, prefix, chain[:, j], t, f, s)
        rows.append(
            -((chain[:, j + 1] - mean) ** 2) / (2 * std**2)
            - math.log(std)
            - 0.5 * math.log(2 * math.pi)
        )
    return torch.stack(rows, 1)


def ref_ppo(new, old, advantage, weights, clips):
    """Section 5.7 on chunk log-probs `[B, Kf]`, written out element by element."""
    n, kf = new.shape
    mean = sum(advantage) / n
    std = torch.sqrt(sum((a - mean) ** 2 for a in advantage) / (n - 1))
    loss, kl, clipped = 0.0, 0.0, 0
    for b in range(n):
        for j in range(kf):
            a = (advantage[b] - mean) / (std + 1e-8) * weights[j]
            log_ratio = new[b, j] - old[b, j]
            r = torch.exp(log_ratio)
            low, high = 1 - clips[j], 1 + clips[j]
            bounded = low if r < low else high if r > high else r
            loss = loss + torch.maximum(-a * r, -a * bounded) / (n * kf)
            kl += (r - 1 - log_ratio).item() / (n * kf)
            clipped += bool(abs(r - 1) > clips[j])
    return loss, kl, clipped / (n * kf)


def test_the_equations_give_the_methods_test_vectors():
    """Sections 11.1, 11.2, 11.7: the reference here is right by itself."""
    s = ref_schedule(20)
    rows = {
        0: (0.007993, 0.9920073, 0.0, 1.0, 0.0, 1.004020, 0.089761),
        9: (0.135922, 0.4938436, 0.339207, 0.203013, 0.786893, 1.423001, 1.012390),
        19: (0.999, 6.059645e-06, 0.996470, 0.077766, 0.031431, 406.234143, 406.232913),
    }
    for t, row in rows.items():
        got = [s[name][t] for name in ("beta", "bar", "sigma", "c1", "c2", "p", "q")]
        assert got == pytest.approx(row, rel=1e-6, abs=5e-7)
    new = torch.tensor([[0.0005, 0.02], [-0.002, 0.003]], dtype=torch.float64)
    got = ref_ppo(
        new, torch.zeros(2, 2), torch.tensor([1.0, -1.0]).double(), [0.99, 1], [0.001, 0.01]
    )
    assert got == pytest.approx((-0.0014991758, 5.199205e-5, 0.5), rel=1e-6)


# ---- world model ---------------------------------------------------------------------------------


@pytest.fixture
def save(tmp_path):
    def write(content, name="vision.ckpt") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


def world_model(save, tmp_path, **shape) -> tuple[dict, VisionWorldModel]:
    w = lumos(**shape)
    made = convert_checkpoint(
        save({"state_dict": w, "epoch": 3}), tmp_path / "wm", "world-model", stoch_classes=C
    )
    assert made.skipped == ["rssm_core.cell.init_h", "rssm_core.cell.init_z"]
    return doubled(w), load_vision_world_model(tmp_path / "wm").double()


def pictures(cameras: int = 2) -> dict[str, torch.Tensor]:
    frames = torch.randint(0, 256, (cameras, 6, 64, 64, 3), dtype=torch.uint8)
    names = ("rgb_static", "rgb_gripper")
    return {n: picture_input(f).double() for n, f in zip(names, frames, strict=False)}


@pytest.mark.parametrize("cameras", [1, 2])
def test_encoder_and_decoder(save, tmp_path, cameras):
    w, model = world_model(save, tmp_path, cameras=cameras)
    x, proprio = pictures(cameras), torch.randn(6, PROPRIO).double()
    assert min(v.min() for v in x.values()) >= -1 and max(v.max() for v in x.values()) <= 1
    expected = ref_encoder(w, {n.removeprefix("rgb_"): v for n, v in x.items()}, proprio)
    got = model.encoder(x | {"proprio": proprio})
    torch.testing.assert_close(got, expected, **EXACT)
    as_time = {n: v.unflatten(0, (2, 3)) for n, v in (x | {"proprio": proprio}).items()}
    torch.testing.assert_close(model.encoder(as_time).flatten(0, 1), got, **EXACT)
    feature = torch.randn(2, 3, DET + S * C).double()
    for camera, decoded in model.decoder(feature).items():
        assert decoded.shape == (2, 3, 3, 64, 64)
        expected = ref_decoder(w, camera.removeprefix("rgb_"), feature.flatten(0, 1))
        torch.testing.assert_close(decoded.flatten(0, 1), expected, **EXACT)


@pytest.mark.parametrize("action_dim", [7, 35], ids=["paper", "ac5"])
def test_prior_step_posterior_scan_and_kl(save, tmp_path, action_dim):
    """Both eras: one action per transition, and a whole chunk of five."""
    w, model = world_model(save, tmp_path, action_dim=action_dim)
    rssm = model.rssm
    T, B, E = 5, 4, 32 * DEPTH + PROPRIO
    embed, action = torch.randn(T, B, E).double(), torch.randn(T, B, action_dim).double()
    reset = (torch.rand(T, B) < 0.3).double()
    uniform = torch.rand(T, B, S).double()
    h, s = torch.randn(B, DET).double(), ref_sample(torch.randn(B, S * C).double(), uniform[0])
    state = RSSMState(h, s)

    imagined = rssm.imagine(state, action[0], uniform[1])
    expected_h = ref_recur(w, h, s, action[0])
    torch.testing.assert_close(imagined.h, expected_h, **EXACT)
    prior = ref_prior(w, expected_h)
    torch.testing.assert_close(rssm.prior_logits(expected_h).flatten(-2), prior, **EXACT)
    torch.testing.assert_close(imagined.z, ref_sample(prior, uniform[1]), **EXACT)

    post = rssm.observe(embed, action, reset, state, uniform)
    kl = []
    for t in range(T):
        keep = 1 - reset[t][:, None]
        h = ref_recur(w, keep * h, keep * s, action[t])
        logits = ref_posterior(w, h, embed[t])
        s = ref_sample(logits, uniform[t])
        torch.testing.assert_close(post.h[t], h, **EXACT)
        torch.testing.assert_close(post.logits[t].flatten(-2), logits, **EXACT)
        torch.testing.assert_close(post.z[t], s, **EXACT)
        q, p = (x.reshape(B, S, C).softmax(-1) for x in (logits, ref_prior(w, h)))
        kl.append((q * (q / p).log()).sum((-2, -1)))
    loss, value = balanced_kl(post.logits, rssm.prior_logits(post.h), 0.8)
    for got in (loss, value):  # 0.8 KL + 0.2 KL: the same number, other gradients
        torch.testing.assert_close(got, torch.stack(kl), rtol=1e-10, atol=1e-10)


def test_world_model_goes_back_bit_for_bit(save, tmp_path):
    w = lumos(35)
    convert_checkpoint(save({"state_dict": w}), tmp_path / "wm", "world-model", stoch_classes=C)
    export_checkpoint(tmp_path / "wm", tmp_path / "back.ckpt")
    content = torch.load(tmp_path / "back.ckpt", weights_only=True)
    same(content["state_dict"], w)


@pytest.mark.parametrize("prefix", ["module.", "world_model.", "_orig_mod."])
def test_a_prefix_before_every_name_is_recognised_and_comes_back(save, tmp_path, prefix):
    w = {prefix + name: value for name, value in lumos().items()}
    convert_checkpoint(save({"state_dict": w}), tmp_path / "wm", "world-model", stoch_classes=C)
    export_checkpoint(tmp_path / "wm", tmp_path / "back.ckpt")
    same(torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"], w)


def test_sizes_of_the_paper():
    """Parameter counts of sections 0.2, 3.1, 5.2 and 11.8; init_h and init_s are extra."""

    def count(module):
        return sum(p.numel() for p in module.parameters())

    from diwa.config import PolicyConfig

    with torch.device("meta"):
        paper, ac5 = VisionConfig(), VisionConfig(proprio_dim=7, action_dim=35)
        assert (paper.embed_dim, ac5.embed_dim) == (1554, 1543)
        model = VisionWorldModel(paper)
        assert count(model) + 2048 == 43_048_342
        assert count(model.encoder.rgb_static) == 1_551_312
        assert VisionWorldModel(ac5).rssm.cell_a.in_features == 35
        for chunk, expected in ((4, 1_611_292), (5, 1_618_467)):
            config = PolicyConfig(chunk=chunk, width=512)
            assert count(DiffusionPolicy(2048, config)) == expected + 1_072
        assert count(Critic(2048, 256)) == 656_385
        assert count(RewardClassifier(2048)) == 2_625_794


# ---- policy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [4, 5], ids=["paper", "ac5"])
def test_chain_log_prob_and_ppo_loss_of_a_fine_tuned_policy(save, tmp_path, chunk):
    K, Kf, B, width = 20, 10, 6, chunk * A
    w = dppo("network", chunk) | dppo("actor_ft", chunk) | dppo_critic()
    made = convert_checkpoint(save({"itr": 9, "model": w}), tmp_path / "p", "policy", ft_steps=Kf)
    assert len(made.also) == 2 and made.sizes["chunk"] == f"{chunk} x 7"
    policy, ft_steps = load_policy(tmp_path / "p")
    base, none = load_policy(tmp_path / "p" / "base")
    assert (ft_steps, none) == (Kf, 0)
    policy, base, w64 = policy.double(), base.double(), doubled(w)
    f, noise = torch.randn(B, 9).double(), 1.5 * torch.randn(K + 1, B, chunk, A).double()

    # Section 3.3: exploring, and as evaluated.
    s = ref_schedule(K)
    for explore in (True, False):
        x, chain = noise[0].reshape(B, width), []
        for t in range(K - 1, -1, -1):
            if t == Kf - 1:
                chain.append(x)
            mean = ref_mean(w64, "actor_ft" if t < Kf else "network", x, t, f, s)
            std = max(s["sigma"][t], 0.1) if explore else (max(s["sigma"][t], 1e-3) if t else 0.0)
            x = mean + std * noise[K - t].reshape(B, width).clamp(-3, 3)
            if t < Kf:
                chain.append(x)
        got = policy.sample(f, noise, base=base, ft_steps=Kf, explore=explore)
        torch.testing.assert_close(got.chunk.flatten(1), x, **TABLE)
        torch.testing.assert_close(got.chain.flatten(2), torch.stack(chain, 1), **TABLE)
        if explore:
            sampled = got.chain

    # Sections 5.6 and 5.7, values and gradients, on other chunks than those sampled.
    moved = sampled + 0.05 * torch.randn_like(sampled)
    tensors = {n: v.clone().requires_grad_() for n, v in w64.items() if n.startswith("actor_ft.")}
    expected = ref_log_prob(tensors, "actor_ft", moved.flatten(2), f, K, Kf)
    policy.requires_grad_(True)
    got = policy.chain_log_prob(f, moved)
    scale = {"rtol": 1e-5, "atol": 1e-3}  # TABLE over a deviation of 0.1, times (x - mean) / std
    torch.testing.assert_close(got.flatten(2), expected, **scale)
    old = (expected.detach() + 0.02 * torch.randn_like(expected)).clamp(-5, 2).mean(-1)
    advantage = torch.randn(B).double()
    weights = [0.99 ** (Kf - 1 - j) for j in range(Kf)]
    clips = [0.001 + 0.009 * (math.exp(3 * j / 9) - 1) / (math.exp(3) - 1) for j in range(Kf)]
    ref_loss, ref_kl, ref_share = ref_ppo(
        expected.clamp(-5, 2).mean(-1), old, advantage, weights, clips
    )
    terms = ppo_loss(
        chunk_log_prob(got),
        old,
        advantage,
        denoising_discount(Kf, 0.99).double(),
        clip_schedule(Kf, 0.01, 0.001, 3.0).double(),
    )
    assert terms.policy_loss.item() == pytest.approx(ref_loss.item(), abs=1e-5)
    assert terms.approx_kl.item() == pytest.approx(ref_kl, abs=1e-6)
    assert terms.clip_fraction.item() == pytest.approx(ref_share, abs=0.02)  # ties at the bound
    assert 0.1 < ref_share < 0.99  # both branches of the loss are at work

    # Gradients of the mean log-prob, which unlike the loss has no bound where the branches differ.
    expected.clamp(-5, 2).mean().backward()
    chunk_log_prob(got).mean().backward()
    grads = {n.removeprefix("net."): p.grad for n, p in policy.named_parameters()}
    layers = "actor_ft.mlp_mean.layers"
    first = torch.cat([grads[f"{n}_in.weight"] for n in ("chunk", "time", "cond")], 1)
    pairs = {
        f"{layers}.0.weight": first,
        f"{layers}.0.bias": grads["cond_in.bias"],
        f"{layers}.1.l1.weight": grads["hidden1.weight"],
        f"{layers}.1.l2.bias": grads["hidden2.bias"],
        f"{layers}.2.weight": grads["out.weight"],
        "actor_ft.time_embedding.1.weight": grads["time.0.weight"],
        "actor_ft.time_embedding.3.weight": grads["time.2.weight"],
    }
    for name, grad in pairs.items():
        want = tensors[name].grad
        assert want.norm() > 0
        assert (grad - want).norm() <= 1e-3 * want.norm(), name  # TABLE, as above


def test_critic_and_classifier(save, tmp_path):
    w = dppo("network") | dppo("actor_ft") | dppo_critic()
    convert_checkpoint(save({"model": w}), tmp_path / "p", "policy")
    from diwa.checkpoint import load_state

    critic = Critic(9, 6)
    load_state(tmp_path / "p" / "critic", critic)
    w64, f = doubled(w), torch.randn(5, 9).double()
    layers = "critic.Q1.layers"
    y = ref_linear(w64, f"{layers}.0", f)
    inner = ref_linear(w64, f"{layers}.1.l1", ref_mish(y))
    y = y + ref_linear(w64, f"{layers}.1.l2", ref_mish(inner))
    expected = ref_linear(w64, f"{layers}.2", y)[:, 0]
    torch.testing.assert_close(critic.double()(f), expected, **EXACT)

    w = classifier()
    made = convert_checkpoint(save(w, "r.pt"), tmp_path / "r", "reward")
    assert made.sizes == {"features": 24, "width": 12, "embedding": 256}
    model, config = load_classifier(tmp_path / "r")
    assert config.kind == "classifier" and config.threshold == 0.5
    f, w = torch.randn(5, 24).double(), doubled(w)
    embedding = ref_linear(w, "projector.2", ref_linear(w, "projector.0", f).clamp(min=0))
    expected = ref_linear(w, "head.fc2", ref_linear(w, "head.fc1", embedding).clamp(min=0))
    torch.testing.assert_close(model.double()(f), expected, **EXACT)


@pytest.mark.parametrize("container", ["", "model", "state_dict"])
def test_classifier_goes_back_under_its_own_names(save, tmp_path, container):
    w = classifier()
    file = save({container: w} if container else w)
    convert_checkpoint(file, tmp_path / "r", "reward")
    export_checkpoint(tmp_path / "r", tmp_path / "back.pt")
    content = torch.load(tmp_path / "back.pt", weights_only=True)
    same(content[container] if container else content, w)


@pytest.mark.parametrize("weights", ["auto", "ema", "model"])
def test_pretrained_policy_takes_the_average_and_goes_back(save, tmp_path, weights):
    ema, model = dppo("network"), dppo("network")
    file = save({"epoch": 5000, "model": model, "ema": ema}, "state_5000.pt")
    convert_checkpoint(file, tmp_path / "p", "policy", weights=weights)
    export_checkpoint(tmp_path / "p", tmp_path / "back.pt")
    content = torch.load(tmp_path / "back.pt", weights_only=True)
    chosen = model if weights == "model" else ema
    same(content["ema"], chosen)
    same(content["model"], chosen)


@pytest.mark.parametrize("base", ["network", "actor", "both"])
def test_fine_tuned_policy_goes_back_with_base_and_critic(save, tmp_path, base):
    w = dppo("network" if base == "both" else base) | dppo("actor_ft") | dppo_critic()
    if base == "both":
        w |= {
            n.replace("network.", "actor."): v.clone() for n, v in dict(w).items() if "work." in n
        }
    convert_checkpoint(save({"itr": 800, "model": w}), tmp_path / "p", "policy")
    export_checkpoint(tmp_path / "p", tmp_path / "back.pt")
    same(torch.load(tmp_path / "back.pt", weights_only=True)["model"], w)


def test_policy_of_a_run_becomes_a_checkpoint_of_dppo(tmp_path):
    from diwa.agent import save_policy
    from diwa.config import PolicyConfig

    policy = DiffusionPolicy(9, PolicyConfig(width=16))
    save_policy(tmp_path / "pretrain", policy)
    save_policy(tmp_path / "finetune", policy, ft_steps=10)
    export_checkpoint(tmp_path / "pretrain", tmp_path / "state.pt")
    convert_checkpoint(tmp_path / "state.pt", tmp_path / "again", "policy")
    for name, value in load_policy(tmp_path / "again")[0].state_dict().items():
        assert torch.equal(value, policy.state_dict()[name])
    with pytest.raises(CheckpointError, match="no folder `base`"):
        export_checkpoint(tmp_path / "finetune", tmp_path / "state.pt")


# ---- bad input -----------------------------------------------------------------------------------


def change(name, value):
    def damage(w):
        w[name] = value(w[name]) if callable(value) else value

    return damage


CELL = "rssm_core.cell."
BAD_WORLD_MODELS = {
    "missing": (lambda w: w.pop(f"{CELL}prior_mlp_h.bias"), r"prior_mlp_h\.bias: missing"),
    "unexpected": (change("inv_dyna.0.weight", torch.zeros(2)), r"no place here:\s+inv_dyna\.0\.w"),
    "second_gru": (
        change(f"{CELL}gru.layers.1.weight_ih", torch.zeros(2, 2)),
        r"no place here:\s+rssm_core\.cell\.gru\.layers\.1\.weight_ih",
    ),
    "other_size": (
        change(f"{CELL}post_mlp_h.weight", lambda v: v[:, :-1]),
        r"post_mlp_h\.weight: file \(10, 11\), expected \(10, 12\)",
    ),
    "deeper_encoder": (
        change("encoder.encoder_static.8.weight", torch.zeros(2, 2, 4, 4)),
        r"no place here:\s+encoder\.encoder_static\.8\.weight",
    ),
    "nan": (change(f"{CELL}in_norm.bias", lambda v: v * torch.nan), r"in_norm\.bias: holds NaN"),
    "integers": (
        change(f"{CELL}in_norm.bias", lambda v: v.long()),
        r"in_norm\.bias: is torch.int64",
    ),
    "flat": (
        change(f"{CELL}prior_mlp.weight", torch.tensor(1.0)),
        r"prior_mlp\.weight has shape \(\)",
    ),
    "classes": (
        lambda w: [w.update({n: w[n][:-1]}) for n in (f"{CELL}prior_mlp.weight",)],
        r"11 latent numbers are no groups of 4",
    ),
    "no_cell": (
        lambda w: [w.pop(n) for n in list(w) if n.startswith("rssm")],
        r"has no rssm_core\.cell\.prior_mlp\.weight; it has encoder",
    ),
}


@pytest.mark.parametrize("kind", BAD_WORLD_MODELS)
def test_world_models_that_do_not_fit(kind, save, tmp_path):
    damage, message = BAD_WORLD_MODELS[kind]
    w = lumos()
    damage(w)
    file = save({"state_dict": w})
    with pytest.raises(CheckpointError, match=f"(?s){re.escape(str(file))}.*{message}"):
        convert_checkpoint(file, tmp_path / "out", "world-model", stoch_classes=C)
    assert not (tmp_path / "out").exists()


def test_unknown_tensors_can_be_kept_and_come_back(save, tmp_path):
    w = lumos() | {"inv_dyna.0.weight": torch.randn(3, 2)}
    made = convert_checkpoint(
        save({"state_dict": w}), tmp_path / "wm", "world-model", stoch_classes=C, skip_unknown=True
    )
    assert "inv_dyna.0.weight" in made.describe()
    export_checkpoint(tmp_path / "wm", tmp_path / "back.ckpt")
    same(torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"], w)


BAD_POLICIES = {
    "plain_mlp": (
        lambda w: [w.update({n.replace("layers", "moduleList"): w.pop(n)}) for n in list(w)],
        r"has no tensors named network|has no mlp_mean\.layers\.0\.weight",
    ),
    "layer_norm": (
        change("network.mlp_mean.layers.1.norm1.weight", torch.zeros(16)),
        r"another network than one residual block.*\s+network\.mlp_mean\.layers\.1\.norm1\.weight",
    ),
    "condition_net": (
        change("network.cond_mlp.moduleList.0.linear_1.weight", torch.zeros(16)),
        r"network\.cond_mlp\.moduleList",
    ),
    "chunk": (change("network.mlp_mean.layers.2.weight", lambda v: v[:-1]), "does not fit actions"),
    "width": (
        change("network.mlp_mean.layers.1.l2.weight", lambda v: v[:, :-1]),
        r"network\.mlp_mean\.layers\.1\.l2\.weight: file \(16, 15\), expected \(16, 16\)",
    ),
    "missing": (
        lambda w: w.pop("network.time_embedding.1.bias"),
        r"time_embedding\.1\.bias: missing",
    ),
    "ddim": (change("eta.eta_logit", torch.zeros(1)), r"no place here:\s+eta\.eta_logit"),
    "two_networks": (
        change("actor.mlp_mean.layers.0.bias", torch.zeros(16)),
        "one network but diff",
    ),
}


@pytest.mark.parametrize("kind", BAD_POLICIES)
def test_policies_that_do_not_fit(kind, save, tmp_path):
    damage, message = BAD_POLICIES[kind]
    w = dppo("network")
    damage(w)
    file = save({"model": w})
    with pytest.raises(CheckpointError, match=f"(?s){re.escape(str(file))}.*({message})"):
        convert_checkpoint(file, tmp_path / "out", "policy")
    assert not (tmp_path / "out").exists()


def test_classifiers_that_do_not_fit(save, tmp_path):
    cases = {
        "0 ways": {k: v for k, v in classifier().items() if "fc1" not in k},
        "2 ways": classifier() | linear("other", 256, 12),
        "hidden widths 12 and 13": classifier()
        | linear("head.fc1", 13, 256)
        | linear("head.fc2", 2, 13),
        r"fc2\.bias: missing": {k: v for k, v in classifier().items() if k != "head.fc2.bias"},
        "no place here": classifier() | {"scale": torch.ones(1)},
    }
    for i, (message, w) in enumerate(cases.items()):
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            convert_checkpoint(save(w, f"{i}.pt"), tmp_path / "out", "reward")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_checkpoint(save, tmp_path):
    good = save({"state_dict": lumos()})
    (tmp_path / "cut.ckpt").write_bytes(good.read_bytes()[:-3000])
    (tmp_path / "text.ckpt").write_text("404 not found")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    for name in ("cut", "text", "empty"):
        file = tmp_path / f"{name}.ckpt"
        with pytest.raises(CheckpointError, match=rf"{name}\.ckpt is (truncated|refused)"):
            convert_checkpoint(file, tmp_path / "out", "world-model")
    with pytest.raises(CheckpointError, match="nowhere.ckpt does not exist"):
        convert_checkpoint(tmp_path / "nowhere.ckpt", tmp_path / "out", "world-model")
    with pytest.raises(CheckpointError, match=r"holds no weights .*\(found: epoch, optimizer\)"):
        convert_checkpoint(save({"epoch": 1, "optimizer": {}}), tmp_path / "out", "world-model")
    with pytest.raises(CheckpointError, match="holds no weights under ema"):
        convert_checkpoint(
            save({"model": dppo("network")}), tmp_path / "out", "policy", weights="ema"
        )


def test_a_folder_is_not_overwritten(save, tmp_path):
    file = save({"model": dppo("network")})
    convert_checkpoint(file, tmp_path / "p", "policy")
    with pytest.raises(CheckpointError, match="holds a model already"):
        convert_checkpoint(file, tmp_path / "p", "policy")


class Runs:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("where", ["top", "beside", "inside"])
def test_a_checkpoint_that_wants_to_run_code_is_refused_before_it_does(where, legacy, tmp_path):
    mark, file = tmp_path / "mark", tmp_path / "evil.ckpt"
    evil = Runs(os.system, f"touch {mark}")
    content = {
        "top": evil,
        "beside": {"state_dict": lumos(), "hyper_parameters": evil},
        "inside": {"state_dict": lumos() | {"x": evil}},
    }[where]
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"evil\.ckpt is (refused|truncated)"):
        convert_checkpoint(file, tmp_path / "out", "world-model", stoch_classes=C)
    assert [p.name for p in tmp_path.iterdir()] == ["evil.ckpt"]
    torch.load(file, weights_only=False)
    assert mark.exists()  # the danger is real


def test_the_configuration_that_lightning_keeps_is_skipped_without_importing_it(
    save, tmp_path, monkeypatch
):
    """`save_hyperparameters` of a Hydra configuration: OmegaConf objects beside the weights."""
    built = []
    module = types.ModuleType("omegaconf.dictconfig")

    class DictConfig:
        def __init__(self, content):
            self.content, self.parent = content, None

        def __setstate__(self, state):
            built.append(state)
            self.__dict__.update(state)

    DictConfig.__module__, DictConfig.__qualname__ = "omegaconf.dictconfig", "DictConfig"
    module.DictConfig = DictConfig
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", module)
    config = DictConfig(
        {"rssm": DictConfig({"cell": {"deter_dim": 1024}}), "_target_": "os.system"}
    )
    w = lumos()
    file = save({"state_dict": w, "hyper_parameters": config})
    convert_checkpoint(file, tmp_path / "wm", "world-model", stoch_classes=C)
    assert not built  # the real class, though importable, was never made
    assert torch.load(file, weights_only=False)["hyper_parameters"].content and built


def test_command_line(save, tmp_path, capsys):
    file = save({"epoch": 1, "model": dppo("network"), "ema": dppo("network")}, "p.pt")
    out = tmp_path / "policy"
    assert cli.main(["convert", "checkpoint", str(file), str(out), "--kind", "policy"]) == 0
    assert "chunk 4 x 7, width 16, denoising steps 20" in capsys.readouterr().out
    assert cli.main(["convert", "to-checkpoint", str(out), str(tmp_path / "back.pt")]) == 0
    assert (tmp_path / "back.pt").exists()
    assert cli.main(["convert", "to-checkpoint", str(tmp_path), "x.pt"]) == 2
    assert "config.json does not exist" in capsys.readouterr().err
    file = save({"net_" + n: v for n, v in dppo("network").items()}, "renamed.pt")
    renamed = ["convert", "checkpoint", str(file), str(tmp_path / "r"), "--kind", "policy"]
    assert cli.main(renamed) == 2
    assert "no tensors named network." in capsys.readouterr().err
    assert cli.main([*renamed, "--rename", "net_network.=network."]) == 0
