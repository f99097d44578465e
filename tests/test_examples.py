"""The scripts in examples/ run and learn; here with settings that take seconds."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "examples"


def load(name):
    pytest.importorskip("gymnasium")
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_dreamer_world_model_learns():
    """A dream of a little-trained model is better than that of an untrained one."""
    result = load("dreamer_world_model").main(steps=80, episodes=30, frames=12)
    assert result["after"] < 0.8 * result["before"]


def test_diffusion_policy_finetune_runs(monkeypatch):
    example = load("diffusion_policy_finetune")
    monkeypatch.setattr(example, "CHUNKS", 4)
    monkeypatch.setattr(example, "ENVS", 4)
    result = example.main(iterations=5, clone_steps=5)
    assert set(result) == {"before", "after"}
    assert all(-200 < value <= 0 for value in result.values())


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda p: p.stem)
def test_examples_are_short_and_explain_themselves(path):
    pytest.importorskip("gymnasium")
    text = path.read_text()
    assert len(text.splitlines()) < 150
    shown = subprocess.run(
        [sys.executable, str(path), "--help"], capture_output=True, text=True, check=True
    )
    assert "--seed" in shown.stdout
