"""Prefetcher: the sampler's batches whatever the timing, errors, the end of the thread, waiting."""

import threading
import time

import numpy as np
import pytest
import torch

from diwa.data.prefetch import DEPTH, Prefetcher
from diwa.data.sampler import StreamSampler, store_rows
from diwa.data.store import Episode, write_store

MODES = [{"threaded": False}, {"threaded": True}, {"threaded": True, "reuse": True}]
each_mode = pytest.mark.parametrize("mode", MODES, ids=["direct", "threaded", "buffers"])


@pytest.fixture
def sampler(tmp_path) -> StreamSampler:
    """Play with pictures of one camera, whose first value is the number of the frame."""

    def numbered(first: int, frames: int) -> Episode:
        n = np.arange(first, first + frames, dtype=np.float32)
        pictures = np.zeros((frames, 4, 6, 3), np.uint8)
        pictures[:, 0, 0, 0] = n
        scene, action = np.zeros((frames, 24), np.float32), np.zeros((frames - 1, 7), np.float32)
        return Episode(np.repeat(n[:, None], 15, 1), scene, action, frames={"rgb_static": pictures})

    store = write_store(tmp_path / "s", [numbered(0, 19), numbered(19, 34), numbered(53, 20)])
    return StreamSampler(
        {"robot": [torch.from_numpy(np.array(e.robot_obs[:, :1])) for e in store]},
        [e.action for e in store],
        batch_size=4,
        seq_len=5,
        seed=1,
        reset_prob=0.1,
        streamed={"rgb_static": store.columns["rgb_static"]},
        rows=store_rows(store.starts, store.lengths, range(3)),
    )


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert batch[name].dtype == value.dtype and torch.equal(batch[name], value), name


@each_mode
def test_batches_are_those_of_the_sampler(sampler, mode):
    """Also the ones that are kept, after steps that are skipped, and from `stop` on."""
    steps = [0, 1, 2, 3, 9, 10, 4, 5, 6, 7, 8, 14, 15]
    with Prefetcher(sampler, stop=12, **mode) as batches:
        got = [batches.batch(step) for step in steps]
    for step, batch in zip(steps, got, strict=True):
        assert_same(batch, sampler.batch(step))
        assert batch["rgb_static"].dtype == torch.uint8
        assert batch["rgb_static"].shape == (5, 4, 4, 6, 3)
        frame = batch["rgb_static"][..., 0, 0, 0].float()
        assert torch.equal(frame, batch["robot"][..., 0]), "pictures and states of the same frames"


def test_shares_of_a_batch_with_pictures(sampler):
    whole = sampler.batch(3)
    for part in (slice(0, 2), slice(2, 4)):
        sampler.streams = part
        assert_same(sampler.batch(3), {k: v[:, part] for k, v in whole.items()})


def test_buffers_are_filled_in_place(sampler):
    buffers = {k: torch.empty_like(v) for k, v in sampler.batch(0).items()}
    made = sampler.batch(7, buffers)
    assert all(made[k] is v for k, v in buffers.items())
    assert_same(buffers, sampler.batch(7))
    buffers["rgb_static"] = buffers["rgb_static"][:, :3]
    with pytest.raises(ValueError, match="rgb_static.npy: out is"):
        sampler.batch(7, buffers)


class Counted:
    """Batches of one number; `fail` is the step that cannot be made."""

    def __init__(self, seconds: float = 0.0, fail: int = -1) -> None:
        self.seconds, self.fail, self.made = seconds, fail, []

    def batch(self, step, out=None):
        time.sleep(self.seconds)
        if step == self.fail:
            raise OSError(f"step {step} cannot be read")
        self.made.append(step)
        return {"x": torch.tensor([float(step)])}


@each_mode
def test_an_error_comes_out_where_the_batch_is_asked_for(mode):
    batches = Prefetcher(Counted(fail=2), stop=9, **mode)
    assert [batches.batch(i)["x"].item() for i in (0, 1)] == [0.0, 1.0]
    with pytest.raises(OSError, match="step 2"):
        batches.batch(2)
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


def test_not_more_than_the_depth_and_no_step_too_far():
    sampler = Counted()
    with Prefetcher(sampler, stop=100) as batches:
        batches.batch(0)
        deadline = time.monotonic() + 20
        while len(sampler.made) < 1 + DEPTH and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)  # for a thread that would go on
        assert sampler.made == [0, 1, 2][: 1 + DEPTH]
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
    sampler = Counted()
    with Prefetcher(sampler, stop=2) as batches:
        for step in range(2):
            batches.batch(step)
    assert sampler.made == [0, 1]


def test_the_share_of_waiting_tells_who_is_slow():
    def share(read: float, train: float, threaded: bool) -> float:
        with Prefetcher(Counted(read), stop=100, threaded=threaded) as batches:
            batches.batch(0)
            batches.wait_share()
            for step in range(1, 9):
                batches.batch(step)
                time.sleep(train)
            return batches.wait_share()

    assert share(0.03, 0.0, True) > 0.8, "nothing else happens"
    slow_training = share(0.01, 0.04, True), share(0.01, 0.04, False)
    assert 0 <= slow_training[0] < slow_training[1], "read while the step before is trained"


@pytest.mark.gpu
def test_batches_on_a_gpu(sampler):
    with Prefetcher(sampler, "cuda", stop=40) as batches:
        for step in (*range(12), 30, 31):
            got = batches.batch(step)
            assert all(v.is_cuda for v in got.values())
            torch.cuda._sleep(1_000_000)  # the next batch arrives while this one is in use
            assert_same({k: v.cpu() for k, v in got.items()}, sampler.batch(step))
