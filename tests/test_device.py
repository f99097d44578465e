"""Devices that cannot be used, and GPUs that are too small: typed errors with a way out."""

import dataclasses

import pytest
import torch
from test_ppo import bandit

from diwa import parallel
from diwa.cli import main
from diwa.device import check_device
from diwa.errors import DeviceError, DeviceMemoryError, DiwaError
from diwa.rl.memory import bytes_per_dream, memory_advice


@pytest.fixture
def gpu(monkeypatch):
    """A torch that says it has one GPU of compute capability 9.0; `capability`, `archs` change."""

    class Gpu:
        capability, archs = (9, 0), ["sm_80", "sm_90", "compute_120"]

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: "Test GPU",
        "get_device_capability": lambda device=None: Gpu.capability,
        "get_arch_list": lambda: Gpu.archs,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return Gpu


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_a_cpu_is_always_there():
    check_device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "mps", "meta"])
def test_unknown_and_foreign_devices(name):
    with pytest.raises(DeviceError, match=f"'{name}'; choose cpu"):
        check_device(name)


def test_why_there_is_no_gpu(no_gpu, monkeypatch):
    def old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nx")

    monkeypatch.setattr(torch.cuda, "init", old)
    with pytest.raises(DeviceError, match=r"too old \(found version 11040\)\); add `--device cpu`"):
        check_device("cuda")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    with pytest.raises(DeviceError, match="CUDA_VISIBLE_DEVICES"):
        check_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DeviceError, match="built without CUDA"):
        check_device("cuda:0")


def test_the_command_line_says_it_in_a_line(no_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    arguments = ["finetune", "--device", "cuda", "--run-dir", str(tmp_path / "run")]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("diwa: no CUDA device is to be had here (this torch is built without")
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there(gpu):
    check_device("cuda:0")
    with pytest.raises(DeviceError, match="no cuda:3 here, the last of 1 is cuda:0"):
        check_device("cuda:3")


@pytest.mark.parametrize(
    "capability, archs, fits",
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),
        ((8, 0), ["sm_86"], False),
        ((6, 1), ["sm_75", "sm_80", "compute_120"], False),
        ((12, 1), ["sm_90", "compute_120"], True),
        ((10, 0), ["sm_90a", "compute_90a"], False),
        ((9, 0), [], True),
    ],
)
def test_architectures(gpu, capability, archs, fits):
    gpu.capability, gpu.archs = capability, archs
    if fits:
        check_device("cuda")
        return
    with pytest.raises(DeviceError, match=rf"Test GPU.*{capability[0]}\.{capability[1]}.*torch"):
        check_device("cuda")


@pytest.fixture
def full(monkeypatch):
    """A GPU of 8 GiB with 1 GiB free and 5 GiB in torch's hands."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 5 * 2**30)


def test_too_many_dreams_are_told_how_many_would_fit(full, monkeypatch):
    tuner = bandit()
    each = bytes_per_dream(tuner.config, tuner.actor, tuner.world_model)
    fit = int(0.9 * 6 * 2**30 / each)
    for dreams, processes, here, proposed in (
        (4 * fit, 1, 4 * fit, fit),
        (4 * fit, 2, 2 * fit, 2 * fit),
        (100, 1, 100, 50),  # by the estimate they would have fitted
        (1, 1, 1, 1),
    ):
        monkeypatch.setattr(parallel, "world_size", lambda processes=processes: processes)
        config = dataclasses.replace(tuner.config, n_dreams=dreams)
        with (
            pytest.raises(DeviceMemoryError) as caught,
            memory_advice(config, tuner.actor, tuner.world_model),
        ):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        text = str(caught.value)
        assert isinstance(caught.value, DiwaError) and f" {here:,} dreams" in text
        assert f"`--finetune.n-dreams {proposed}`" in text and "6.0 GiB can be had" in text
        assert "--finetune.minibatches" in text


def test_other_errors_are_left_alone(full):
    tuner = bandit()
    with (
        pytest.raises(RuntimeError, match="else") as caught,
        memory_advice(tuner.config, tuner.actor, tuner.world_model),
    ):
        raise RuntimeError("something else")
    assert not isinstance(caught.value, DiwaError)


@pytest.mark.gpu
def test_the_estimate_is_of_the_right_size():
    """Within a factor of two of what more dreams take, by torch's own count."""
    peaks = []
    for dreams in (256, 1024):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        tuner = bandit(device="cuda", n_dreams=dreams, minibatches=1)
        for step in tuner.graphs():
            step.enabled = False
        tuner.iteration(1)
        peaks.append(torch.cuda.max_memory_allocated())
    each = bytes_per_dream(tuner.config, tuner.actor, tuner.world_model)
    assert 0.5 < (peaks[1] - peaks[0]) / 768 / each < 2
