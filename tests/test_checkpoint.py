"""Models and training states: exact round trips, atomic replacement, errors that name the thing."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from diwa import checkpoint
from diwa.errors import CheckpointError


def small(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.LayerNorm(width))


def test_model_round_trip_is_exact(tmp_path):
    model, other = small(), small()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    checkpoint.save_model(tmp_path / "m", model, {"width": 4})
    checkpoint.load_state(tmp_path / "m", other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert checkpoint.read_meta(tmp_path / "m") == {"width": 4}
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_tied_and_transposed_weights_can_be_saved(tmp_path):
    first = nn.Linear(3, 3, bias=False)
    second = nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    model.register_buffer("t", torch.arange(6.0).view(2, 3).T)
    checkpoint.save_model(tmp_path, model, {})
    tensors = checkpoint.read_tensors(tmp_path / "model.safetensors")
    assert torch.equal(tensors["1.weight"], first.weight)
    assert torch.equal(tensors["t"], model.t)


def test_other_architecture_names_tensor_and_shapes(tmp_path):
    checkpoint.save_model(tmp_path, small(4), {})
    with pytest.raises(CheckpointError, match=r"0\.weight: file \(4, 3\), model \(5, 3\)"):
        checkpoint.load_state(tmp_path, small(5))
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        checkpoint.load_state(tmp_path, small(5), strict=False)


def test_missing_and_extra_tensors_are_named(tmp_path):
    checkpoint.save_model(tmp_path, small(), {})
    bigger = nn.Sequential(*small(), nn.Linear(4, 1))
    with pytest.raises(CheckpointError, match=r"2\.weight: missing in the file"):
        checkpoint.load_state(tmp_path, bigger)
    checkpoint.load_state(tmp_path, bigger, strict=False)
    with pytest.raises(CheckpointError, match=r"1\.bias: unknown to the model"):
        checkpoint.load_state(tmp_path, nn.Sequential(nn.Linear(3, 4)))


def test_missing_and_truncated_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="model.safetensors does not exist"):
        checkpoint.load_state(tmp_path, small())
    checkpoint.save_model(tmp_path, small(), {})
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="model.safetensors is truncated"):
        checkpoint.load_state(tmp_path, small())
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(CheckpointError, match="config.json is damaged"):
        checkpoint.read_meta(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    checkpoint.write_json(tmp_path / "a.json", {"x": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def training_setup(seed: int):
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    return {"model": model, "optimizer": optimizer}, {"torch": generator, "numpy": rng}


def train(modules, generators, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        x = torch.randn(5, 3, generator=generators["torch"])
        loss = (modules["model"](x) * float(generators["numpy"].uniform())).square().mean()
        modules["optimizer"].zero_grad()
        loss.backward()
        modules["optimizer"].step()
        losses.append(loss.item())
    return losses


def test_training_state_continues_exactly(tmp_path):
    modules, generators = training_setup(1)
    train(modules, generators, 3)
    values = {"step": 3, "extra": {"h": torch.ones(2), "a": np.arange(3), "t": (1, [2.5, None])}}
    checkpoint.save_training_state(tmp_path, modules=modules, generators=generators, values=values)
    expected = train(modules, generators, 4)

    modules, generators = training_setup(2)
    loaded = checkpoint.load_training_state(tmp_path, modules=modules, generators=generators)
    assert train(modules, generators, 4) == expected
    assert loaded["step"] == 3
    assert loaded["extra"]["t"] == (1, [2.5, None])
    assert torch.equal(loaded["extra"]["h"], torch.ones(2))
    assert np.array_equal(loaded["extra"]["a"], np.arange(3))


def test_training_state_survives_a_kill_at_every_write(tmp_path, monkeypatch):
    modules, generators = training_setup(1)

    def save(step):
        checkpoint.save_training_state(
            tmp_path, modules=modules, generators=generators, values={"step": step}
        )

    save(1)
    save(2)
    replace, calls = checkpoint.os.replace, []

    def killed_at(n):
        def fake(*arguments):
            calls.append(arguments)
            if len(calls) == n:
                raise KeyboardInterrupt
            replace(*arguments)

        return fake

    for n in (1, 2):
        calls.clear()
        monkeypatch.setattr(checkpoint.os, "replace", killed_at(n))
        with pytest.raises(KeyboardInterrupt):
            save(3)
        monkeypatch.setattr(checkpoint.os, "replace", replace)
        loaded = checkpoint.load_training_state(tmp_path, modules=modules, generators=generators)
        assert loaded == {"step": 2}
    save(4)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_no_state_is_none_and_a_foreign_state_is_refused(tmp_path):
    modules, generators = training_setup(1)
    load = checkpoint.load_training_state
    assert load(tmp_path, modules=modules, generators=generators) is None
    checkpoint.save_training_state(tmp_path, modules=modules, generators=generators, values={})
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        load(tmp_path, modules={"model": modules["model"]}, generators=generators)
    with pytest.raises(CheckpointError, match="size mismatch"):
        load(tmp_path, modules={**modules, "model": small(7)}, generators=generators)


def test_objects_are_not_stored(tmp_path):
    with pytest.raises(TypeError, match="object cannot be stored"):
        checkpoint.write_json(tmp_path / "a.json", {"x": object()})
    assert not list(tmp_path.iterdir())
