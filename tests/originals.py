"""Checkpoints as the originals write them, and their equations in plain torch (method.md)."""

import math

import torch
import torch.nn.functional as F

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
