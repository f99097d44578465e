"""StreamSampler: resets at true starts, action alignment, coverage, purity; episode split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diwa.data.sampler import StreamSampler, previous_actions, split_episodes, store_rows
from diwa.data.store import NEUTRAL_ACTION


def make(lengths, batch_size=3, seq_len=4, seed=0, reset_prob=0.0) -> StreamSampler:
    """Episodes whose column holds (episode, frame) and whose action t of episode i is (i, t)."""
    columns = [
        torch.stack([torch.full((n + 1,), float(i)), torch.arange(n + 1.0)], 1)
        for i, n in enumerate(lengths)
    ]
    actions = [
        np.concatenate([np.full((n, 1), i), np.arange(n)[:, None], np.zeros((n, 5))], 1).astype(
            np.float32
        )
        for i, n in enumerate(lengths)
    ]
    return StreamSampler(
        {"where": columns},
        actions,
        batch_size=batch_size,
        seq_len=seq_len,
        seed=seed,
        reset_prob=reset_prob,
    )


sizes = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda x: sum(x) >= 10)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**31))
def test_resets_and_actions_of_every_batch(lengths, batch_size, seq_len, seed):
    sampler = make(lengths, batch_size, seq_len, seed)
    for step in range(2 * sampler.steps_per_epoch):
        batch = sampler.batch(step)
        where, action, reset = batch["where"], batch["action"], batch["reset"]
        assert where.shape == (seq_len, batch_size, 2) and action.shape == (seq_len, batch_size, 7)
        assert reset.shape == (seq_len, batch_size)
        start = where[..., 1] == 0
        assert reset[start].all(), "every true episode start resets"
        assert (action[start] == torch.from_numpy(NEUTRAL_ACTION)).all()
        inside = ~start
        assert torch.equal(action[inside][:, 0], where[inside][:, 0])
        assert torch.equal(action[inside][:, 1], where[inside][:, 1] - 1), "the previous action"
        expected = start.float()
        if sampler.new_epoch(step):
            expected[0] = 1
        assert torch.equal(reset, expected)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 5), st.integers(1, 9))
def test_streams_run_on_from_batch_to_batch(lengths, batch_size, seq_len):
    """Within an epoch the frames of a stream are consecutive, across batches and boundaries."""
    sampler = make(lengths, batch_size, seq_len)
    first = np.concatenate([[0], np.cumsum([n + 1 for n in lengths])])
    steps = [sampler.batch(i)["where"] for i in range(sampler.steps_per_epoch)]
    where = torch.cat(steps).long().numpy()
    number = first[where[..., 0]] + where[..., 1]
    assert ((number[1:] - number[:-1]) % sampler.frames == 1 % sampler.frames).all()


def test_an_epoch_covers_all_frames_once_where_the_sizes_divide():
    sampler = make([23, 11, 35], batch_size=6, seq_len=4)  # 72 frames
    assert sampler.steps_per_epoch == 3
    for epoch in range(3):
        seen = torch.cat([sampler.batch(3 * epoch + i)["where"].flatten(0, 1) for i in range(3)])
        assert len(seen.unique(dim=0)) == len(seen) == sampler.frames
    assert not torch.equal(sampler.batch(0)["where"], sampler.batch(3)["where"])


def test_no_frame_is_left_out_in_the_long_run():
    sampler = make([10, 17, 22], batch_size=4, seq_len=5)
    seen = torch.cat([sampler.batch(i)["where"].flatten(0, 1) for i in range(100)])
    assert len(seen.unique(dim=0)) == sampler.frames


def test_batch_is_a_pure_function_of_seed_and_step():
    a, b = make([20, 30], reset_prob=0.3), make([20, 30], reset_prob=0.3)
    later = [b.batch(i) for i in (7, 2, 7)]
    for i in range(7):
        a.batch(i)
    for key, value in a.batch(7).items():
        assert torch.equal(value, later[0][key]) and torch.equal(value, later[2][key])
    other = make([20, 30], seed=1, reset_prob=0.3)
    assert any(not torch.equal(other.batch(i)["where"], a.batch(i)["where"]) for i in range(3))


def test_batches_do_not_alias_the_data():
    sampler = make([20, 30])
    before = sampler.first.clone()
    for value in sampler.batch(0).values():
        value.fill_(-9)
    assert torch.equal(sampler.first, before)
    assert sampler.batch(0)["where"].min() >= 0


def test_extra_resets_have_their_probability_and_keep_the_action():
    sampler = make([400, 500], batch_size=10, seq_len=20, reset_prob=0.1)
    batches = [sampler.batch(i) for i in range(40)]
    inside = [b["where"][1:, :, 1] > 0 for b in batches]
    extra = torch.cat([b["reset"][1:][k] for b, k in zip(batches, inside, strict=True)])
    deviation = (0.09 / len(extra)) ** 0.5
    assert abs(extra.mean().item() - 0.1) < 5 * deviation
    for batch, keep in zip(batches, inside, strict=True):
        frame, action = batch["where"][1:][keep], batch["action"][1:][keep]
        assert torch.equal(action[:, 1], frame[:, 1] - 1)


def test_fewer_frames_than_a_batch():
    sampler = make([5], batch_size=4, seq_len=8)
    assert sampler.steps_per_epoch == 1 and sampler.new_epoch(3)
    assert sampler.batch(3)["where"].shape == (8, 4, 2)


def test_previous_actions():
    action = np.arange(14, dtype=np.float64).reshape(2, 7)
    led = previous_actions(action)
    assert led.dtype == np.float32
    np.testing.assert_array_equal(led, np.concatenate([NEUTRAL_ACTION[None], action]))


@pytest.mark.parametrize("count", [2, 5, 19, 20, 40, 101])
def test_split_is_a_partition_with_about_the_share(count):
    train, held = split_episodes([None] * count, 0.05)
    assert sorted(train + held) == list(range(count)) and train and held
    assert len(held) == max(1, count // 20)


def test_split_without_holdout_and_of_one_episode():
    assert split_episodes([None] * 4, 0.0) == ([0, 1, 2, 3], [])
    assert split_episodes([None], 0.05) == ([0], [])


def test_streamed_columns_belong_to_the_same_frames(tmp_path):
    """Pictures are read from disk for exactly the frames whose other columns are in memory."""
    from diwa.data.store import Episode, write_store

    def numbered(first: int, frames: int) -> Episode:
        n = np.arange(first, first + frames, dtype=np.float32)
        pictures = np.broadcast_to(n[:, None, None, None], (frames, 2, 2, 3)).astype(np.uint8)
        return Episode(
            np.repeat(n[:, None], 15, 1),
            np.zeros((frames, 24), np.float32),
            np.zeros((frames - 1, 7), np.float32),
            frames={"rgb_static": pictures},
        )

    store = write_store(tmp_path / "s", [numbered(0, 9), numbered(50, 14), numbered(100, 20)])
    chosen = [0, 2]  # the middle one is held out
    robot = [torch.from_numpy(np.array(store[i].robot_obs[:, :1])) for i in chosen]
    arguments = dict(batch_size=3, seq_len=4, seed=1)
    rows = store_rows(store.starts, store.lengths, chosen)
    sampler = StreamSampler(
        {"robot": robot},
        [store[i].action for i in chosen],
        streamed={"rgb_static": store.columns["rgb_static"]},
        rows=rows,
        **arguments,
    )
    seen = set()
    for step in range(30):
        batch = sampler.batch(step)
        assert batch["rgb_static"].shape == (4, 3, 2, 2, 3)
        np.testing.assert_array_equal(batch["rgb_static"][..., 0, 0, 0], batch["robot"][..., 0])
        seen |= set(batch["robot"].flatten().int().tolist())
    assert seen == {*range(9), *range(100, 120)}
    with pytest.raises(ValueError, match="rows of all 29 frames"):
        StreamSampler(
            {"robot": robot},
            [store[i].action for i in chosen],
            streamed={"rgb_static": store.columns["rgb_static"]},
            rows=rows[:-1],
            **arguments,
        )
