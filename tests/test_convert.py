"""Checkpoints of LUMOS, DiWA and DPPO: both ways, and every block against its equations.

The functions named `ref_*` state the method's equations (sections 1 to 5) in plain torch on a dict
of tensors under the original's names. They share no code with `diwa`. Everything is compared in
float64, where the two agree to rounding unless a table of ours is kept in float32.
"""

import math
from pathlib import Path

import pytest
import torch
from originals import (
    DEPTH,
    DET,
    EXACT,
    PROPRIO,
    TABLE,
    A,
    C,
    S,
    classifier,
    doubled,
    dppo,
    dppo_critic,
    lumos,
    ref_decoder,
    ref_encoder,
    ref_linear,
    ref_log_prob,
    ref_mean,
    ref_mish,
    ref_posterior,
    ref_ppo,
    ref_prior,
    ref_recur,
    ref_sample,
    ref_schedule,
    same,
)

from diwa.agent import load_classifier, load_policy
from diwa.convert import convert_checkpoint, export_checkpoint, load_vision_world_model
from diwa.errors import CheckpointError
from diwa.nn.diffusion import DiffusionPolicy
from diwa.nn.heads import Critic, RewardClassifier
from diwa.nn.rssm import RSSMState
from diwa.nn.vision import VisionConfig, VisionWorldModel, picture_input
from diwa.ops import balanced_kl
from diwa.rl.ppo import chunk_log_prob, clip_schedule, denoising_discount, ppo_loss


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
