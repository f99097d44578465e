"""The training step of the world model: precision, and what a CUDA graph asks of it."""

import dataclasses

import pytest
import torch
from test_world_model_parallel import CONFIG, prepare, with_model
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from diwa import cli
from diwa.data.store import EpisodeStore
from diwa.errors import DiwaError
from diwa.ops import use_backend
from diwa.phases import world_model_trainer
from diwa.phases.world_model_trainer import Trainer


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    path = tmp_path_factory.mktemp("play")
    prepare(path)
    return list(EpisodeStore(path / "collect" / "play"))


def trainer(play, **changes) -> Trainer:
    return Trainer(with_model(**changes).world_model, play, 0, "cpu")


def test_bfloat16_is_close_and_its_weights_are_float32(play):
    exact, rounded = trainer(play), trainer(play, precision="bfloat16")
    for step in range(30):
        a, b = exact.step(step), rounded.step(step)
        if step == 0:
            # Operands keep 8 bits; another sample here and there changes the loss by more.
            assert b["loss"].item() == pytest.approx(a["loss"].item(), rel=0.02)
            assert b["loss"].item() != a["loss"].item()
            first = b["loss"].item()
    assert b["loss"].item() < 0.7 * first
    assert b["loss"].item() == pytest.approx(a["loss"].item(), rel=0.3)
    for name, p in rounded.model.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32, name
    assert all(b[k].dtype == torch.float32 for k in ("loss", "reconstruction", "kl"))
    assert rounded.carried.h.dtype == rounded.carried.z.dtype == torch.float32


def test_the_scan_is_rounded_too(play, monkeypatch):
    given = []
    plain = world_model_trainer.WorldModel.loss

    def loss(self, *arguments):
        observe = self.rssm.observe
        self.rssm.observe = lambda *a, **k: given.append(k) or observe(*a, **k)
        return plain(self, *arguments)

    monkeypatch.setattr(world_model_trainer.WorldModel, "loss", loss)
    trainer(play, precision="bfloat16").step(0)
    trainer(play).step(0)
    assert [k["dtype"] for k in given] == [torch.bfloat16, torch.float32]


def test_another_precision_is_refused():
    with pytest.raises(DiwaError, match="precision is 'float16'; choose from float32, bfloat16"):
        cli.check(with_model(precision="float16"))


class StrictStep:
    """Stands in for `GraphedStep` and is as strict as a replayed graph: after the first call the
    inputs are copied into the ones that were captured, which must have the same names and shapes,
    and results are buffers of the graph, spoiled before they are written again."""

    def __init__(self, fn, device) -> None:
        self.fn, self.inputs, self.outputs = fn, None, None

    def __call__(self, inputs):
        if self.inputs is None:
            self.inputs = {k: v.clone() for k, v in inputs.items()}
            self.outputs = self.fn(dict(self.inputs))
            return dict(self.outputs)
        assert inputs.keys() == self.inputs.keys()
        for name, value in inputs.items():
            assert value.shape == self.inputs[name].shape and value.dtype == self.inputs[name].dtype
            self.inputs[name].copy_(value)
        for value in self.outputs.values():
            value.fill_(torch.nan)
        for name, value in self.fn(dict(self.inputs)).items():
            self.outputs[name].copy_(value)
        return dict(self.outputs)


def test_steps_as_replayed_graphs_train_the_same(play, monkeypatch):
    plain = trainer(play)
    expected = [{k: v.clone() for k, v in plain.step(i).items()} for i in range(7)]
    monkeypatch.setattr(world_model_trainer, "GraphedStep", StrictStep)
    strict = trainer(play)
    for step, want in enumerate(expected):
        got = strict.step(step)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[k], want[k]) for k in want), step
    for a, b in zip(plain.model.parameters(), strict.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_forward_and_backward_read_nothing_on_the_host(backend, precision):
    """Tensors without data: whatever asks for a value, as `.item()` does, raises."""
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("CPU tensors run on Triton under TRITON_INTERPRET=1 only")
    c = dataclasses.replace(CONFIG.world_model, precision=precision)
    with FakeTensorMode(), use_backend(backend):
        model = world_model_trainer.WorldModel(c)
        state = model.rssm.initial(3)
        inputs = (torch.randn(5, 3, model.codec.size), torch.randn(5, 3, 7), torch.zeros(5, 3))
        loss = model.loss({"state": inputs[0]}, *inputs[1:], state, torch.rand(5, 3, 4))
        loss.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c.grad_clip)
        for value in (loss.total, norm):
            with pytest.raises(DataDependentOutputException):
                value.item()
