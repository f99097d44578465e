"""Episode store: round trip, and every kind of damage is a StoreError that names the file."""

import json
import os
import shutil

import numpy as np
import pytest

from diwa.data.store import NEUTRAL_ACTION, Episode, EpisodeStore, write_store
from diwa.errors import StoreError
from diwa.phases.collect import load_starts, save_starts


def episode(length: int, seed: int = 0, task: str = "", success: bool = False) -> Episode:
    rng = np.random.default_rng(seed)

    def numbers(*shape: int) -> np.ndarray:
        return rng.uniform(-1, 1, shape).astype(np.float32)

    flags = np.arange(length + 1) == length if success else None
    return Episode(
        numbers(length + 1, 15), numbers(length + 1, 24), numbers(length, 7), flags, task
    )


@pytest.fixture
def store(tmp_path) -> EpisodeStore:
    episodes = [episode(5, 0, "open_drawer", True), episode(0, 1), episode(9, 2, "close_drawer")]
    return write_store(tmp_path / "play", episodes)


def test_round_trip(store):
    assert len(store) == 3 and store.transitions == 14 and store.frames == 17
    expected = [episode(5, 0, "open_drawer", True), episode(0, 1), episode(9, 2, "close_drawer")]
    for got, want in zip(EpisodeStore(store.path), expected, strict=True):
        got.validate()
        assert got.task == want.task and len(got) == len(want)
        for key in ("robot_obs", "scene_obs", "action"):
            np.testing.assert_array_equal(getattr(got, key), getattr(want, key))
            assert getattr(got, key).dtype == np.float32
        wanted = np.zeros(len(want) + 1, bool) if want.success is None else want.success
        np.testing.assert_array_equal(got.success, wanted)
    np.testing.assert_array_equal(store[-1].action, store[2].action)
    with pytest.raises(IndexError):
        store[3]


def test_the_frame_after_the_last_action_holds_the_neutral_action(store):
    ends = store.starts + store.lengths
    np.testing.assert_array_equal(store.action[ends], np.tile(NEUTRAL_ACTION, (3, 1)))


def test_nothing_else_is_left_beside_the_store(store):
    assert [p.name for p in store.path.parent.iterdir()] == ["play"]
    files = {"action.npy", "index.json", "robot_obs.npy", "scene_obs.npy", "success.npy"}
    assert {p.name for p in store.path.iterdir()} == files


def cut(path):
    path.write_bytes(path.read_bytes()[:-8])


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(b"\x80\x04garbage" * 20)


def delete(path):
    path.unlink()


def other_shape(path):
    np.save(path, np.zeros((17, 3), np.float32))


COLUMNS = ["robot_obs.npy", "scene_obs.npy", "action.npy", "success.npy"]


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("damage", [cut, empty, garbage, delete, other_shape])
def test_a_damaged_column_is_named(store, name, damage):
    damage(store.path / name)
    with pytest.raises(StoreError, match=name):
        EpisodeStore(store.path)


@pytest.mark.parametrize("damage", [cut, empty, garbage])
def test_a_damaged_index_is_named(store, damage):
    damage(store.path / "index.json")
    with pytest.raises(StoreError, match="index.json"):
        EpisodeStore(store.path)


@pytest.mark.parametrize(
    "index",
    [
        {},
        [],
        {"lengths": [5, 0, 9]},
        {"lengths": [5, 0, 9], "tasks": ["a"]},
        {"lengths": [5, -1, 10], "tasks": ["", "", ""]},
        {"lengths": [[5, 0, 9]], "tasks": [""]},
        {"lengths": ["x"], "tasks": [""]},
        {"lengths": None, "tasks": []},
    ],
)
def test_an_index_that_makes_no_sense_is_named(store, index):
    (store.path / "index.json").write_text(json.dumps(index))
    with pytest.raises(StoreError, match="index.json"):
        EpisodeStore(store.path)


def test_an_index_of_other_data_is_noticed(store):
    index = {"lengths": [5, 0, 8], "tasks": ["", "", ""]}
    (store.path / "index.json").write_text(json.dumps(index))
    with pytest.raises(StoreError, match="index.json says"):
        EpisodeStore(store.path)


def test_a_missing_store_says_what_to_do(tmp_path):
    with pytest.raises(StoreError, match=r"nowhere.*diwa collect"):
        EpisodeStore(tmp_path / "nowhere")


def broken(key: str, kind: str) -> Episode:
    bad = episode(4, success=True)
    value = getattr(bad, key)
    if kind == "shape":
        setattr(bad, key, value[:-1])
    else:
        value.reshape(-1)[3] = np.nan if kind == "nan" else np.inf
    return bad


CASES = [(k, v) for k in ("robot_obs", "scene_obs", "action") for v in ("shape", "nan", "inf")]


@pytest.mark.parametrize(("key", "kind"), [*CASES, ("success", "shape")])
def test_a_bad_episode_is_refused_before_anything_is_written(tmp_path, key, kind):
    named = "episode 1|action" if kind == "shape" else f"episode 1.*{key}"
    with pytest.raises(StoreError, match=named):
        write_store(tmp_path / "play", [episode(3), broken(key, kind)])
    assert list(tmp_path.iterdir()) == []


def test_no_episodes_are_refused(tmp_path):
    with pytest.raises(StoreError, match="no episodes"):
        write_store(tmp_path / "play", [])


def test_a_failed_write_leaves_the_old_store(store, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_store(store.path, [episode(3)])
    assert [p.name for p in store.path.parent.iterdir()] == ["play"]
    assert len(EpisodeStore(store.path)) == 3


def test_a_new_store_replaces_the_old_one(store):
    assert len(write_store(store.path, [episode(3)])) == 1
    assert [p.name for p in store.path.parent.iterdir()] == ["play"]


def test_an_interrupted_write_does_not_hinder_the_next(tmp_path):
    """A killed process leaves its partial folder; in a container the next one has its number."""
    write_store(tmp_path / "play", [episode(3)])

    partial = tmp_path / f".play.partial-{os.getpid()}"
    shutil.copytree(tmp_path / "play", partial)
    assert len(write_store(tmp_path / "play", [episode(3), episode(4)])) == 2
    assert not partial.exists()


def test_the_store_never_unpickles(store):
    np.save(store.path / "action.npy", np.array([{}] * 17, dtype=object), allow_pickle=True)
    with pytest.raises(StoreError, match="action.npy"):
        EpisodeStore(store.path)


def test_starts_round_trip(tmp_path):
    starts = {"robot_obs": np.ones((3, 15), np.float32), "scene_obs": np.ones((3, 24), np.float32)}
    save_starts(tmp_path / "starts.npz", starts)
    assert [p.name for p in tmp_path.iterdir()] == ["starts.npz"]
    for key, value in load_starts(tmp_path / "starts.npz").items():
        np.testing.assert_array_equal(value, starts[key])


@pytest.mark.parametrize("damage", [cut, empty, garbage, delete])
def test_damaged_starts_are_named(tmp_path, damage):
    path = tmp_path / "starts.npz"
    save_starts(path, {"robot_obs": np.ones((3, 15)), "scene_obs": np.ones((3, 24))})
    damage(path)
    with pytest.raises(StoreError, match="starts.npz"):
        load_starts(path)


# Optional columns: pictures


def filmed(length: int, seed: int = 0, size: int = 6) -> Episode:
    rng = np.random.default_rng(seed)
    plain = episode(length, seed)
    plain.frames = {
        name: rng.integers(0, 256, (length + 1, size, size, 3), np.uint8)
        for name in ("rgb_static", "rgb_gripper")
    }
    return plain


@pytest.fixture
def film(tmp_path) -> EpisodeStore:
    return write_store(tmp_path / "film", [filmed(5, 0), filmed(0, 1), filmed(9, 2)])


def test_pictures_round_trip_without_being_loaded(film):
    assert film.cameras == ["rgb_static", "rgb_gripper"]
    for got, want in zip(film, [filmed(5, 0), filmed(0, 1), filmed(9, 2)], strict=True):
        got.validate()
        for name in film.cameras:
            np.testing.assert_array_equal(got.frames[name], want.frames[name])
            assert not got.frames[name].flags.owndata and not got.frames[name].flags.writeable


def test_rows_are_read_in_any_order(film):
    column = film.columns["rgb_static"]
    rng = np.random.default_rng(0)
    start = rng.integers(0, 12, 7)
    streams = (np.arange(9)[:, None] + start) % 17  # [T, B] with wraps
    for rows in (
        streams,
        rng.integers(0, 17, (3, 4, 2)),
        np.arange(17),
        np.array([16]),
        streams[:0],
    ):
        got = column.read(rows)
        assert got.shape == (*rows.shape, 6, 6, 3) and got.flags.owndata
        np.testing.assert_array_equal(got, column.array[rows])
    column.release()
    np.testing.assert_array_equal(column.read(streams), column.array[streams])
    for bad in (-1, 17):
        with pytest.raises(IndexError, match=rf"rgb_static.npy: rows {bad} to {bad} of 17"):
            column.read(np.array([bad]))


def test_pages_that_were_read_are_handed_back(tmp_path):
    """Resident memory of the mapping stays bounded however much of it is read."""
    from diwa.data import columns

    file = tmp_path / "c.npy"
    np.save(file, np.ones((4000, 64, 64, 3), np.uint8))  # 48 MB

    def resident() -> int:
        with open("/proc/self/smaps") as maps:
            text = maps.read().split(str(file))
        return sum(int(part.split("Rss:")[1].split()[0]) for part in text[1:])

    column = columns.Column(file)
    limit, columns.RELEASE_BYTES = columns.RELEASE_BYTES, 1 << 20
    try:
        for first in range(0, 4000, 50):
            column.read(np.arange(first, first + 50))
            assert resident() < 12 << 10  # kB; one fault may map 4 MB
    finally:
        columns.RELEASE_BYTES = limit
    column.array.max()
    assert resident() > 40 << 10  # the measurement sees what stays mapped
    column.release()
    assert resident() < 12 << 10


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: (p / "rgb_static.npy").unlink(), r"rgb_static.npy is missing"),
        (
            lambda p: cut(p / "rgb_static.npy"),
            r"rgb_static.npy is missing or truncated \(\d+ bytes",
        ),
        (
            lambda p: np.save(p / "rgb_static.npy", np.zeros((17, 5, 6, 3), np.uint8)),
            r"rgb_static.npy is uint8 \(17, 5, 6, 3\), index.json says uint8 \(17, 6, 6, 3\)",
        ),
        (
            lambda p: np.save(p / "rgb_static.npy", np.array([{}] * 17), allow_pickle=True),
            r"rgb_static.npy is missing or truncated \(object",
        ),
        (
            lambda p: (p / "index.json").write_text(
                (p / "index.json").read_text().replace("rgb_static", "../rgb_static")
            ),
            r"'../rgb_static' cannot be the name",
        ),
    ],
)
def test_damaged_pictures_are_named(film, damage, message):
    damage(film.path)
    with pytest.raises(StoreError, match=message):
        EpisodeStore(film.path)


def test_pictures_that_do_not_fit_are_refused(tmp_path):
    for change, message in (
        (lambda f: f.astype(np.float32), "rgb_static is float32"),
        (lambda f: f[:-1], r"rgb_static is uint8 \(5, 6, 6, 3\), expected uint8 \(6, height"),
        (lambda f: f[..., :2], r"expected uint8 \(6, height, width, 3\)"),
    ):
        bad = filmed(5)
        bad.frames = {"rgb_static": change(bad.frames["rgb_static"])}
        with pytest.raises(StoreError, match=message):
            write_store(tmp_path / "bad", [bad])
    with pytest.raises(StoreError, match="episode 1 for .* has pictures {}, episode 0 has"):
        write_store(tmp_path / "bad", [filmed(5), episode(5)])
    odd = filmed(5)
    odd.frames = {"action": odd.frames["rgb_static"]}
    with pytest.raises(StoreError, match="'action' cannot be the name of a store column"):
        write_store(tmp_path / "bad", [odd])
    assert not list(tmp_path.iterdir())
