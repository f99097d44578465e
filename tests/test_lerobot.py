"""LeRobot datasets of version 3: what arrives in the store, resuming, and every kind of damage."""

import json
import shutil
import sys
from pathlib import Path

import lerobot_made as made
import numpy as np
import pytest

from diwa import cli
from diwa.data.store import NEUTRAL_ACTION, EpisodeStore
from diwa.errors import StoreError

pytest.importorskip("pyarrow")
av = pytest.importorskip("av")

from diwa.data import lerobot_convert  # noqa: E402 (after the skips)
from diwa.data.lerobot_convert import LeRobotKeys, lerobot_to_store, parse_cameras  # noqa: E402
from diwa.data.lerobot_format import LeRobotDataset  # noqa: E402

CAMERAS = {made.TOP: "rgb_static", made.WRIST: "rgb_gripper"}
KEYS = LeRobotKeys(CAMERAS, state="observation.state", success="next.success")
FRAMES = sum(made.LENGTHS)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    return made.write_dataset(tmp_path_factory.mktemp("lerobot") / "pick")


@pytest.fixture
def dataset(template, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(template, tmp_path / "pick"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def assert_pictures(store: EpisodeStore, indices: list[int]) -> None:
    """Each frame of the store shows that frame of the dataset, by its grey."""
    for camera, name in CAMERAS.items():
        pictures = store.columns[name].array
        wanted = np.array([made.grey(i, camera) for i in indices])
        # Neighbouring frames differ by 8; 8-bit limited-range YCbCr and the codec cost up to 3.
        assert np.abs(pictures.astype(int) - wanted[:, None, None, None]).max() <= 3, name


def test_store_holds_what_the_dataset_shows(template, tmp_path):
    seen = []
    store = lerobot_to_store(
        template, tmp_path / "s", KEYS, size=16, progress=lambda *done: seen.append(done)
    )
    assert seen[-1] == (FRAMES, FRAMES)
    assert tuple(store.lengths + 1) == made.LENGTHS and store.tasks == [""] * 4
    assert store.cameras == ["rgb_static", "rgb_gripper"]
    assert store.columns["rgb_static"].shape == (FRAMES, 16, 16, 3)
    assert store.source["fps"] == made.FPS
    assert store.source["sentences"] == [[s] for s in made.SENTENCES]
    assert_pictures(store, list(range(FRAMES)))
    values = made.numbers()
    state = values["observation.state"]
    np.testing.assert_array_equal(store.columns["state"].array, state)
    np.testing.assert_array_equal(store.robot_obs, np.pad(state, ((0, 0), (0, 7))))
    assert not store.scene_obs.any()
    for e, episode in enumerate(store):
        episode.validate()
        first, last = made.STARTS[e], made.STARTS[e + 1] - 1
        np.testing.assert_array_equal(episode.action, values["action"][first:last])
        np.testing.assert_array_equal(store.action[last], NEUTRAL_ACTION)
        # next.success is true for the action before the last frame
        assert episode.success.tolist() == [False] * len(episode) + [True]


@pytest.mark.skipif("libsvtav1" not in av.codecs_available, reason="av has no libsvtav1")
def test_av1(tmp_path):
    """The codec that LeRobot writes by default."""
    made.write_dataset(tmp_path / "pick", codec="libsvtav1")
    store = lerobot_to_store(tmp_path / "pick", tmp_path / "s", KEYS, size=16)
    assert_pictures(store, list(range(FRAMES)))


def test_pictures_inside_the_tables(tmp_path):
    made.write_dataset(tmp_path / "pick", dtype="image")
    assert not (tmp_path / "pick" / "videos").exists()
    store = lerobot_to_store(tmp_path / "pick", tmp_path / "s", KEYS, size=16)
    for camera, name in CAMERAS.items():  # PNG loses nothing
        grey = store.columns[name].array[:, 0, 0, 0]
        assert grey.tolist() == [made.grey(i, camera) for i in range(FRAMES)]
    broken = [{"bytes": b"no picture", "path": "0.png"}] * FRAMES
    rewrite(tmp_path / "pick", **{made.TOP: broken})
    with pytest.raises(
        StoreError, match=r"file-000.parquet: .*top of episode 0, frame 0 cannot be"
    ):
        lerobot_to_store(tmp_path / "pick", tmp_path / "t", KEYS, size=16)
    rewrite(tmp_path / "pick", **{made.TOP: [{"bytes": None, "path": "0.png"}] * FRAMES})
    with pytest.raises(StoreError, match=r"file-000.parquet: .*top holds no picture in row 0"):
        lerobot_to_store(tmp_path / "pick", tmp_path / "t", KEYS, size=16)


def test_episodes_of_one_sentence_are_found_by_seeking(template, tmp_path):
    store = lerobot_to_store(
        template,
        tmp_path / "s",
        KEYS,
        task="turn_on_lightbulb",
        sentence="push the switch",
        size=16,
    )
    assert tuple(store.lengths + 1) == (8, 7) and store.tasks == ["turn_on_lightbulb"] * 2
    assert store.source["episodes"] == [1, 3]
    chosen = [i for i in range(FRAMES) if made.episode_at(i) in (1, 3)]
    assert_pictures(store, chosen)
    with pytest.raises(StoreError, match="no episode of 'wave'; it has: open the drawer; push the"):
        lerobot_to_store(template, tmp_path / "t", KEYS, sentence="wave")


def test_pictures_backwards(template):
    """Every order of episodes gives the same pictures."""
    from diwa.data.video_reader import VideoReader

    source, reader = LeRobotDataset(template), VideoReader()
    for e in (3, 0, 2, 1, 1):
        for t, shown in enumerate(source.pictures(source.episodes[e], made.WRIST, reader)):
            wanted = made.grey(made.STARTS[e] + t, made.WRIST)
            assert abs(int(shown[0, 0, 0]) - wanted) <= 3


def test_full_size_keeps_the_pictures_size(template, tmp_path):
    store = lerobot_to_store(template, tmp_path / "s", KEYS, size=0)
    assert store.columns["rgb_static"].shape == (FRAMES, 48, 64, 3)
    with pytest.raises(StoreError, match="rgb_gripper of episode 0, frame 0: a 32 x 32 picture"):
        lerobot_to_store(template, tmp_path / "t", KEYS, size=40)


def test_actions_are_chosen_scaled_and_shifted(dataset, tmp_path):
    action = made.numbers()["action"]
    wide = np.concatenate([2.5 * action[:, :6], 0.5 * action[:, 6:] + 0.5, action], 1)
    rewrite(dataset, action=wide)
    keys = {"action_dims": (*range(6), 6)}
    with pytest.raises(
        StoreError, match=r"action has 14 numbers, the store's action 7 .*--action-d"
    ):
        lerobot_to_store(dataset, tmp_path / "s", LeRobotKeys({}))
    with pytest.raises(
        StoreError, match=r"file-000.parquet: action\[\d\] is -?[12]\.\d+ in episode"
    ):
        lerobot_to_store(dataset, tmp_path / "s", LeRobotKeys({}, **keys))
    scaled = {"action_scale": (0.4,) * 6 + (2.0,), "action_offset": (0.0,) * 6 + (-1.0,)}
    store = lerobot_to_store(dataset, tmp_path / "s", LeRobotKeys({}, **keys, **scaled))
    assert store.cameras == [] and not store.robot_obs.any()
    for e, episode in enumerate(store):
        wanted = action[made.STARTS[e] : made.STARTS[e + 1] - 1]
        np.testing.assert_allclose(episode.action, wanted, atol=1e-6)  # float32 there and back
    with pytest.raises(StoreError, match=r"has 14 numbers, --action-dims are \[99\]"):
        lerobot_to_store(dataset, tmp_path / "t", LeRobotKeys({}, action_dims=(99,)))
    with pytest.raises(StoreError, match="--action-scale takes 1 or 7 numbers"):
        lerobot_to_store(dataset, tmp_path / "t", LeRobotKeys({}, action_scale=(1.0, 2.0)))


def test_camera_flags():
    assert parse_cameras(["a.top=rgb_static", "b.left-wrist"]) == {
        "a.top": "rgb_static",
        "b.left-wrist": "left_wrist",
    }
    with pytest.raises(StoreError, match="cannot be the name of a store column"):
        parse_cameras(["a=action"])
    with pytest.raises(StoreError, match="is a column x already"):
        parse_cameras(["a=x", "b=x"])


def test_command_line(template, tmp_path, capsys):
    command = ["convert", "lerobot", str(template), str(tmp_path / "s")]
    pairs = [f"{key}={name}" for key, name in CAMERAS.items()]
    flags = ["--camera", *pairs, "--action", "action", "--state", "observation.state"]
    assert cli.main([*command, *flags, "--size", "8"]) == 0
    assert "26 frames in 4 episodes, 5 per second" in capsys.readouterr().out
    assert EpisodeStore(tmp_path / "s").cameras == ["rgb_static", "rgb_gripper"]
    assert cli.main([*command, *flags]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["pyarrow", "av"])
def test_missing_extra_is_three_lines_of_help(module, template, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["convert", "lerobot", str(template), str(tmp_path / "s")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3 and module in lines[0]
    assert 'pip install "diwa[lerobot]"' in lines[1]


# Interrupted conversions


def test_a_stopped_conversion_goes_on_and_nobody_sees_it_before(template, tmp_path, monkeypatch):
    expected = files(lerobot_to_store(template, tmp_path / "all", KEYS, size=16).path)
    for stop_at in (3, 11, 19):  # inside an episode, in the second table, in the last video

        def stop(done, total, stop_at=stop_at):
            if done == stop_at:
                raise KeyboardInterrupt

        target = tmp_path / f"store{stop_at}"
        with pytest.raises(KeyboardInterrupt):
            lerobot_to_store(template, target, KEYS, size=16, progress=stop)
        assert not target.exists()
        seen = []
        store = lerobot_to_store(
            template, target, KEYS, size=16, progress=lambda done, _, seen=seen: seen.append(done)
        )
        assert seen == list(range(stop_at + 1, FRAMES + 1)) and files(store.path) == expected


def test_other_keys_start_again(template, tmp_path):
    def stop(done, total):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lerobot_to_store(template, tmp_path / "s", KEYS, size=16, progress=stop)
    seen = []
    halved = LeRobotKeys(CAMERAS, action_scale=(0.5,))
    lerobot_to_store(
        template, tmp_path / "s", halved, size=16, progress=lambda done, _: seen.append(done)
    )
    assert seen[0] == 1


# Bad input


def change_info(folder: Path, **changes) -> None:
    file = folder / "meta" / "info.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def rewrite(folder: Path, drop: str = "", **columns) -> None:
    """Replace columns of all tables by these values of all frames."""
    import pyarrow as pa
    from pyarrow import parquet

    done = 0
    for file in sorted((folder / "data").rglob("*.parquet")):
        table = parquet.read_table(file)
        for name, values in columns.items():
            rows = pa.array(list(values[done : done + len(table)]))
            table = table.set_column(table.schema.get_field_index(name), name, rows)
        done += len(table)
        parquet.write_table(table.drop_columns([drop] if drop else []), file)


def cut(path: Path, share: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def with_nan() -> np.ndarray:
    action = made.numbers()["action"].copy()
    action[7, 2] = np.nan
    return action


DATA, EPISODES = "data/chunk-000/file-001.parquet", "meta/episodes/chunk-000/file-000.parquet"
VIDEO = f"videos/{made.TOP}/chunk-000/file-001.mp4"
V2 = {"codebase_version": "v2.1"}
BAD = {
    "no_folder": (lambda d: shutil.rmtree(d), r"pick is not a folder"),
    "no_info": (
        lambda d: (d / "meta/info.json").unlink(),
        r"info.json is missing; give the folder",
    ),
    "info_text": (lambda d: (d / "meta/info.json").write_text("{"), r"info.json is damaged"),
    "version": (lambda d: change_info(d, **V2), r"info.json: codebase_version is v2.1.*v21_to_v30"),
    "no_fps": (lambda d: change_info(d, fps=None), r"info.json cannot be used: no 'fps'"),
    "fps_zero": (lambda d: change_info(d, fps=0), r"info.json cannot be used: fps is 0"),
    "template": (
        lambda d: change_info(d, data_path="{x}.parquet"),
        r"data_path is '\{x\}.parquet'",
    ),
    "escape": (
        lambda d: change_info(d, video_path="../a.mp4"),
        r"video_path .* leaves the dataset",
    ),
    "totals": (lambda d: change_info(d, total_frames=99), r"4 episodes of 26 frames, .* 4 of 99"),
    "no_episodes": (lambda d: shutil.rmtree(d / "meta/episodes"), r"episodes holds no chunk-000"),
    "episode_lost": (lambda d: (d / EPISODES).unlink(), r"episodes: episode 0 is missing"),
    "episodes_cut": (lambda d: cut(d / EPISODES), r"file-000.parquet is truncated or damaged"),
    "no_table": (lambda d: (d / DATA).unlink(), r"file-001.parquet is missing; the download"),
    "table_cut": (lambda d: cut(d / DATA), r"data/chunk-000/file-001.parquet is truncated"),
    "table_empty": (lambda d: (d / DATA).write_bytes(b""), r"file-001.parquet is truncated"),
    "no_column": (lambda d: rewrite(d, "action"), r"file-000.parquet has no column action; it has"),
    "nan": (lambda d: rewrite(d, action=with_nan()), r"action holds NaN .* in episode 1, frame 2"),
    "text": (lambda d: rewrite(d, action=["x"] * FRAMES), r"action .*string is no column of numb"),
    "ragged": (
        lambda d: rewrite(d, action=[[0.0] * (7 - (i == 3)) for i in range(FRAMES)]),
        r"file-000.parquet: action is .*90 numbers in 13 rows",
    ),
    "order": (
        lambda d: rewrite(d, index=np.arange(FRAMES)[::-1]),
        r"does not hold frames 0 to 4 of episode 0 in their order",
    ),
    "no_video": (lambda d: (d / VIDEO).unlink(), r"file-001.mp4 is missing .*top of episode 3"),
    "video_cut": (lambda d: cut(d / VIDEO), r"file-001.mp4 is truncated or no video: .*top of ep"),
    "video_text": (lambda d: (d / VIDEO).write_text("404"), r"file-001.mp4 is truncated or no vid"),
    "video_short": (
        lambda d: made.write_video(d / VIDEO, [19, 20, 21], made.TOP),
        r"file-001.mp4 ends before 0.600 s, which is observation.images.top of episode 3, frame 3",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named_and_conversion_goes_on_once_it_is_repaired(
    kind, dataset, template, tmp_path
):
    damage, message = BAD[kind]
    damage(dataset)
    with pytest.raises(StoreError, match=message):
        lerobot_to_store(dataset, tmp_path / "s", KEYS, size=16)
    assert not (tmp_path / "s").exists()
    shutil.rmtree(dataset, ignore_errors=True)
    shutil.copytree(template, dataset)
    assert lerobot_to_store(dataset, tmp_path / "s", KEYS, size=16).frames == FRAMES


def test_a_video_cut_after_its_index_is_named(dataset, tmp_path):
    """With the index in front (faststart) the file opens; its pictures end."""
    file = dataset / "videos" / made.WRIST / "chunk-000" / "file-000.mp4"
    with (
        av.open(str(file)) as old,
        av.open(str(tmp_path / "f.mp4"), "w", options={"movflags": "faststart"}) as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    cut(tmp_path / "f.mp4", 0.7)
    shutil.move(tmp_path / "f.mp4", file)
    with pytest.raises(StoreError, match=r"wrist/chunk-000/file-000.mp4 .*wrist of episode \d"):
        lerobot_to_store(dataset, tmp_path / "s", KEYS, size=16)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            LeRobotKeys({"observation.image.top": "a"}),
            r"no camera '.*'; perhaps observation.images",
        ),
        (LeRobotKeys({"action": "a"}), r"no camera 'action' \(it is float32\)"),
        (LeRobotKeys({}, action="actions"), r"no numeric feature 'actions'; perhaps action"),
        (LeRobotKeys({}, action="language"), r"no numeric feature 'language' \(it is string\)"),
        (LeRobotKeys({}, state=made.TOP), r"no numeric feature '.*top' \(it is video\)"),
        (LeRobotKeys({}, scene="observation.state"), r"has 8 numbers, the store's scene_obs 24"),
    ],
)
def test_unknown_keys_are_named_with_suggestions(keys, message, template, tmp_path):
    with pytest.raises(StoreError, match=message):
        lerobot_to_store(template, tmp_path / "s", keys)


def test_commits_every_so_often(template, tmp_path, monkeypatch):
    """SIGKILL leaves no time for tidying: what counts is what was committed."""
    from diwa.data.writer import StoreWriter

    committed = []
    original = StoreWriter.commit
    monkeypatch.setattr(lerobot_convert, "COMMIT_FRAMES", 10)
    monkeypatch.setattr(
        StoreWriter, "commit", lambda self, n: (committed.append(n), original(self, n))[1]
    )
    lerobot_to_store(template, tmp_path / "s", KEYS, size=16)
    assert committed == [10, 20, 26]
