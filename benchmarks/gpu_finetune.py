"""Fine-tuning at the paper's sizes on a world model with random weights: the speed of the loop.

    python -m benchmarks.gpu_finetune --out finetune.json [--seconds 120] [--iterations 768]

Nothing is learned from random weights; the work is the same. Reports the median time of an
iteration (50 dreams x 36 chunks x 4 steps, 10 epochs) and of its rollout and update, imagined steps
per second, kernel launches per iteration and, if all iterations ran before `--seconds`, the wall
clock from start to saved policy. `--tiny --device cpu` tries the code without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diwa.agent import save_policy
from diwa.config import Config
from diwa.envs.dream import ClassifierSuccess
from diwa.nn.diffusion import DiffusionPolicy
from diwa.nn.heads import RewardClassifier
from diwa.nn.world_model import WorldModel
from diwa.phases.finetune import Finetuner, make_dream
from diwa.presets import PRESETS

PAPER_ITERATIONS, STARTS = 768, 200


def build(config: Config) -> Finetuner:
    """A fine-tuning of random models on random starts."""
    torch.manual_seed(0)
    device = torch.device(config.device)
    model = WorldModel(config.world_model).requires_grad_(False).eval().to(device)
    base = DiffusionPolicy(model.feature_dim, config.policy).requires_grad_(False).to(device)
    head = RewardClassifier(model.feature_dim, config.reward.width).requires_grad_(False)
    starts = {"robot_obs": torch.randn(STARTS, 15), "scene_obs": torch.randn(STARTS, 24)}
    starts = {name: t.to(device) for name, t in starts.items()}
    success = ClassifierSuccess(head.to(device), config.reward.threshold)
    return Finetuner(config, model, base, make_dream(config, model, success, starts))


def settings(device: str, tiny: bool, frozen_dtype: str = "float32") -> Config:
    """The paper's hyper-parameters; no simulator, no behaviour cloning, every epoch runs."""
    preset = PRESETS["tiny" if tiny else "paper"]
    c = dataclasses.replace(preset.finetune, bc_coef=0.0, eval_every=0, target_kl=1e9)
    if not tiny:
        c = dataclasses.replace(c, n_dreams=50, n_chunks=36, update_epochs=10, minibatches=1)
    c = dataclasses.replace(c, frozen_dtype=frozen_dtype)
    return dataclasses.replace(preset, device=device, finetune=c)


def launches(call: Callable[[], Any]) -> int | None:
    """Kernels and graphs that one call starts; None if the profiler sees no device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    names = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
    wanted = (*names, "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
    return sum(e.count for e in profile.key_averages() if e.key in wanted) or None


class Watch:
    """Seconds since it was made or last read, with the device's work finished."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.last = cuda, time.perf_counter()

    def __call__(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        before, self.last = self.last, time.perf_counter()
        return self.last - before


def run(
    config: Config, iterations: int, seconds: float, graph: bool, tf32: bool = False
) -> dict[str, Any]:
    """Times iterations; `graphs` says which steps were captured, standard error why one was not."""
    cuda = config.device.startswith("cuda")
    begin = time.perf_counter()
    tuner = build(config)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    for step in tuner.graphs():
        step.enabled &= graph
    watch, times = Watch(cuda), []
    finite = torch.ones((), dtype=torch.bool, device=tuner.device)
    for number in range(iterations):
        if time.perf_counter() - begin > seconds:
            break
        watch()
        r = tuner.rollout()
        first = watch()
        tuner.update(r, train_actor=number >= config.finetune.critic_warmup)
        times.append((first, watch()))
        finite &= r.log_prob.isfinite().all()
    with tempfile.TemporaryDirectory() as folder:
        save_policy(Path(folder), tuner.actor, config.finetune.ft_denoising_steps)
    total = time.perf_counter() - begin
    c, chunk = config.finetune, config.policy.chunk
    steps = c.n_dreams * c.n_chunks * chunk
    steady = times[3:] or times  # the first ones tune GEMMs and compile kernels
    median = statistics.median(a + b for a, b in steady)
    out: dict[str, Any] = {
        "finetune_iteration_s": median,
        "rollout_s": statistics.median(a for a, _ in steady),
        "update_s": statistics.median(b for _, b in steady),
        "rollout_imagined_steps_per_s": steps / statistics.median(a for a, _ in steady),
        "iterations": len(times),
        "imagined_steps": len(times) * steps,
        "finite": bool(finite),
        "frozen_dtype": c.frozen_dtype,
        "tf32": tf32,
        "graphs": {step.name: step.captured for step in tuner.graphs()},
    }
    if len(times) == iterations == PAPER_ITERATIONS:
        out["finetune_full"] = {"seconds": total, "imagined_steps": out["imagined_steps"]}
    if cuda:
        out["launches_per_iteration"] = launches(lambda: tuner.update(tuner.rollout(), True))
        out["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    return out


def _old_log_prob_error(config: Config, tf32: bool) -> float:
    """Largest difference between old log-probabilities and those of the network before any
    update; a ratio of PPO starts at one only if this is small."""
    tuner = build(config)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    r = tuner.rollout()
    feature, chain = (t.flatten(0, 1)[:256] for t in (r.feature, r.chain))
    with torch.no_grad():
        new: Tensor = tuner.actor.chain_log_prob(feature, chain).clamp(-5, 2).mean((-2, -1))
    return (new - r.log_prob.flatten(0, 1)[:256]).abs().max().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--iterations", type=int, default=PAPER_ITERATIONS)
    parser.add_argument("--seconds", type=float, default=120.0, help="no iteration after this")
    parser.add_argument("--no-graph", action="store_true", help="launch kernel by kernel")
    parser.add_argument(
        "--frozen-dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="of the frozen denoising steps; the cluster kernel is for bfloat16 [%(default)s]",
    )
    parser.add_argument("--tf32", action="store_true", help="GEMMs in TF32, which diwa does not")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the code")
    parser.add_argument("--out", type=Path, help="JSON file; none is written without it")
    a = parser.parse_args()
    config = settings(a.device, a.tiny, a.frozen_dtype)
    result = run(config, a.iterations, a.seconds, not a.no_graph, a.tf32)
    result["old_log_prob_error"] = _old_log_prob_error(config, a.tf32)
    text = json.dumps(result, indent=1)
    print(text)
    if a.out:
        a.out.write_text(text + "\n", encoding="utf-8")
    return 0 if result["finite"] else 1


if __name__ == "__main__":
    sys.exit(main())
