"""What can be tried without a GPU of the scripts that need one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "gpu_check.sh"
KEYS = {"op", "case", "dtype", "median_s", "vs_original", "vs_best_peer", "error_vs_fp64"}
bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def run(*command):
    return subprocess.run(
        [str(c) for c in command], cwd=ROOT, capture_output=True, text=True, timeout=250
    )


@bash
def test_script_is_well_formed_and_refuses_what_it_does_not_know():
    assert run("bash", "-n", SCRIPT).returncode == 0
    done = run("bash", SCRIPT, "--nonsense")
    assert done.returncode == 2 and "usage" in done.stderr


@pytest.mark.slow
def test_operators_are_compared_on_the_cpu(tmp_path):
    out = tmp_path / "operators.json"
    done = run(
        *(sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny"),
        *("--only", "pointwise", "--out", out),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert {item["op"] for item in result["items"]} >= {"gae", "balanced_kl"}
    assert all(item.keys() >= KEYS for item in result["items"])
    named = [why for d in result["details"]["items"] for why in d["skipped"].values()]
    assert "no CUDA device" in named


@pytest.mark.slow
def test_finetuning_runs_on_the_cpu(tmp_path):
    out = tmp_path / "finetune.json"
    module = ("benchmarks.gpu_finetune", "--device", "cpu", "--tiny", "--iterations", 1)
    done = run(sys.executable, "-m", *module, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["iterations"] == 1 and "finetune_full" not in result
    # float32 on both sides, but two orders of summation, divided by deviations of 0.1
    assert result["old_log_prob_error"] < 1e-4
