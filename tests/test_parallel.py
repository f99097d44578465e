"""`diwa.parallel` in two gloo processes, and in one process, where it does nothing."""

import pytest
import torch
from ranks import run_ranks

from diwa import parallel
from diwa.errors import RunError


def _model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 2)
    )


def _collectives(folder: str) -> None:
    assert (parallel.rank(), parallel.world_size(), parallel.is_main()) == (0, 1, True)
    with parallel.session("cpu") as device:
        rank = parallel.rank()
        assert device == "cpu" and parallel.world_size() == 2
        assert parallel.is_main() == (rank == 0)
        model = _model(rank)
        model[1].running_mean.fill_(rank)
        parallel.broadcast_module(model)
        mean = parallel.all_reduce_mean(torch.tensor([1.0, 10.0]) * rank)
        rows = parallel.share(6)
        joined = parallel.gather(torch.full((2, 1), float(rank)), dim=1)
        model.eval()
        torch.manual_seed(3)
        data = torch.randn(6, 5)
        model[2].bias.requires_grad_(False)  # has no gradient, in any process
        model(data[rows]).square().mean().backward()
        own = model[0].weight.grad.clone()
        parallel.all_reduce_gradients(model.parameters())
        called = []
        parallel.on_main(lambda: called.append(rank))
        assert called == ([0] if rank == 0 else [])
        parallel.barrier()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        with pytest.raises(RunError, match="dreams is 7.* 2 processes"):
            parallel.share(7, "dreams")
        result = {"mean": mean, "joined": joined, "own": own, "gradients": gradients}
        result |= {"rows": (rows.start, rows.stop), "weights": model.state_dict()}
        torch.save(result, f"{folder}/{rank}.pt")
    assert parallel.world_size() == 1 and not torch.distributed.is_initialized()


def test_collectives_of_two_processes(tmp_path):
    run_ranks(_collectives, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["rows"] == (0, 3) and second["rows"] == (3, 6)
    model = _model(0)
    for name, value in model.state_dict().items():
        for got in (first, second):
            assert torch.equal(got["weights"][name], value), f"{name} is rank 0's"
    for got in (first, second):
        assert got["mean"].tolist() == [0.5, 5.0]
        assert got["joined"].tolist() == [[0.0, 1.0], [0.0, 1.0]]
    model.eval()
    torch.manual_seed(3)
    model[2].bias.requires_grad_(False)
    model(torch.randn(6, 5)).square().mean().backward()
    assert not torch.allclose(first["own"], second["own"])
    whole = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(whole) == len(first["gradients"]) == 5
    for one, a, b in zip(whole, first["gradients"], second["gradients"], strict=True):
        assert torch.equal(a, b), "the weights would drift apart"
        # Sums of 6 or 3 + 3 float32 terms of order one: a few roundings of 6e-8.
        torch.testing.assert_close(a, one, rtol=1e-5, atol=1e-6)


def _failing_main(folder: str) -> None:
    def fail() -> None:
        raise ValueError("the disk is gone")

    with parallel.session():
        kind = ValueError if parallel.is_main() else RunError
        with pytest.raises(kind, match="disk is gone|process 0"):
            parallel.on_main(fail)
        parallel.barrier()  # both are still in step
        torch.save({}, f"{folder}/{parallel.rank()}.pt")


def test_an_error_of_the_main_process_reaches_the_others(tmp_path):
    run_ranks(_failing_main, str(tmp_path))
    assert len(list(tmp_path.glob("*.pt"))) == 2


def test_one_process_communicates_nothing():
    model = _model(0)
    model(torch.randn(4, 5)).mean().backward()
    before = [p.grad.clone() for p in model.parameters()]
    with parallel.session("cuda:3") as device:  # untouched, also where there is no such GPU
        assert device == "cuda:3" and not torch.distributed.is_initialized()
        parallel.broadcast_module(model)
        parallel.all_reduce_gradients(model.parameters())
        parallel.barrier()
        value = torch.tensor(3.0, requires_grad=True)
        assert parallel.all_reduce_mean(value).item() == 3.0
        assert parallel.gather(value) is value and parallel.share(7) == slice(0, 7)
        with pytest.raises(KeyError):
            parallel.on_main(lambda: {}["x"])
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("device", "local", "message"),
    [("cuda", "2", "no GPU of its own, there are 2"), ("cuda:1", "0", "take `--device cuda`")],
)
def test_one_gpu_for_each_process(monkeypatch, device, local, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "3", "RANK": local, "LOCAL_RANK": local}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=message), parallel.session(device):
        pass
