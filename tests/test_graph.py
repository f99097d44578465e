"""GraphedStep: what is captured, copied and replayed, on a stand-in for CUDA's graphs."""

import contextlib
import types

import pytest
import torch

from diwa.graph import GraphedStep


class FakeCuda:
    """Stands in for streams and graphs of torch.cuda; `log` says what happened in which order.

    A step under capture leaves its work in `again`, as a GPU records it without doing it; a replay
    does it.
    """

    def __init__(self, monkeypatch) -> None:
        self.log, self.current, self.fail = [], "main", ""
        self.capturing = None
        patch = {
            "Stream": lambda device: self.log.append("stream") or FakeStream(self, "side"),
            "current_stream": lambda device=None: FakeStream(self, self.current),
            "set_stream": lambda stream: setattr(self, "current", stream.name),
            "stream": self.stream,
            "synchronize": lambda device=None: self.log.append("synchronize"),
            "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: self.replay()),
            "graph": self.graph,
        }
        for name, value in patch.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph):
        """As torch's: when the step fails, so does the end of the capture, and the stream stays."""
        self.log.append("begin")
        self.current = "capture"
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("capture was invalidated") from error
        if self.fail:
            raise RuntimeError(self.fail)
        self.log.append("end")
        self.current = "main"

    def replay(self):
        self.log.append("replay")
        self.again()


class FakeStream:
    def __init__(self, cuda, name) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class Doubler:
    """y = 2 x + calls, on buffers of its own in a capture."""

    def __init__(self, cuda) -> None:
        self.cuda, self.calls, self.weight = cuda, torch.zeros(()), torch.ones(1)
        self.seen = []

    def __call__(self, inputs):
        self.seen.append((self.cuda.current, inputs["x"].data_ptr()))
        y = torch.empty_like(inputs["x"])

        def work():
            self.calls.add_(1)
            y.copy_(2 * inputs["x"] + self.calls)

        if self.cuda.current == "capture":
            self.cuda.again = work
        else:
            work()
        return {"y": y}


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def call(step, *values):
    return step({"x": torch.tensor(values)})["y"].tolist()


def test_warm_up_capture_and_replay_are_one_step_each(cuda):
    fn = Doubler(cuda)
    step = GraphedStep(fn, "cuda", warmup=2)
    assert [call(step, 1.0, float(i)) for i in range(5)] == [
        [2 + n, 2 * i + n] for i, n in zip(range(5), range(1, 6), strict=True)
    ]
    assert [where for where, _ in fn.seen] == ["side", "side", "capture"], "not called afterwards"
    around = ["side waits for main", "main waits for side"]
    assert cuda.log == ["stream", *around * 2, "begin", "end", *["replay"] * 3]
    assert step.captured and cuda.current == "main"


def test_the_graph_reads_its_own_copies(cuda):
    fn = Doubler(cuda)
    step = GraphedStep(fn, "cuda", warmup=1)
    x = torch.ones(2)
    step({"x": x})
    first = step({"x": x})["y"]
    assert fn.seen[-1][1] != x.data_ptr(), "the caller's tensor may be freed"
    x.fill_(5)
    second = step({"x": x})
    assert second["y"] is first and first.tolist() == [13.0, 13.0], "outputs are its buffers"
    second.clear()
    assert call(step, 0.0, 0.0) == [4.0, 4.0], "a caller may take outputs out of the dict"
    assert x.tolist() == [5.0, 5.0]


def test_every_set_of_shapes_has_a_graph_of_its_own(cuda):
    fn = Doubler(cuda)
    step = GraphedStep(fn, "cuda", warmup=1)
    for values in ((1.0,), (1.0, 2.0), (1.0,), (1.0, 2.0)):
        call(step, *values)
    assert cuda.log.count("begin") == 2
    cuda.log.clear()
    assert len(call(step, 1.0)) == 1 and cuda.log == ["replay"]


def test_versions_of_what_it_writes_are_counted_up(cuda):
    fn = Doubler(cuda)
    step = GraphedStep(fn, "cuda", warmup=0, writes=[fn.weight])
    before = fn.weight._version
    call(step, 1.0)
    assert fn.weight._version > before


@pytest.mark.parametrize("where", ["step", "end"])
def test_a_refused_capture_goes_on_eagerly_with_one_line(cuda, capsys, where):
    inner = Doubler(cuda)

    def fn(inputs):
        if where == "step" and cuda.current == "capture":
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return inner(inputs)

    cuda.fail = "" if where == "step" else "out of graphs"
    step = GraphedStep(fn, "cuda", warmup=1, name="rollout")
    assert [call(step, 1.0) for _ in range(4)] == [[3.0], [4.0], [5.0], [6.0]]
    lines = capsys.readouterr().err.splitlines()
    why = "operation not permitted" if where == "step" else "out of graphs"
    assert lines == [f"diwa: no CUDA graph of the rollout, it runs eagerly: {why}"]
    assert not step.captured and cuda.log.count("begin") == 1
    assert cuda.current == "main", "the stream of the capture was left on"


def test_an_error_of_another_kind_is_not_hidden(cuda):
    def fn(inputs):
        raise TypeError("wrong")

    with pytest.raises(TypeError, match="wrong"):
        GraphedStep(fn, "cuda", warmup=0)({"x": torch.zeros(1)})


def test_a_refusal_given_beforehand_is_said_on_a_gpu_only(cuda, capsys):
    for device, said in (("cpu", 0), ("cuda", 1)):
        fn = Doubler(cuda)
        step = GraphedStep(fn, device, warmup=0, name="update", refusal="gradients travel")
        assert [call(step, 1.0) for _ in range(2)] == [[3.0], [4.0]]
        assert capsys.readouterr().err.count("gradients travel") == said
    assert not cuda.log


def test_on_a_cpu_the_step_is_called_with_the_very_inputs(cuda):
    fn, x = Doubler(cuda), torch.zeros(1)
    GraphedStep(fn, "cpu")({"x": x})
    assert fn.seen == [("main", x.data_ptr())] and not cuda.log
