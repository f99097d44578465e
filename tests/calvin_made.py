"""A small CALVIN split as its authors would have written it, and what a test compares of it."""

from pathlib import Path

import numpy as np

from diwa.envs.tasks import DRAWER

EPISODES = [(7, 16), (20, 31)]
STATISTICS = """robot_obs:
  - _target_: os.system
    mean: [0.5, -1.0,
           2.0]
    std: [1e-3, 2, 3]
act_max_bound: [1.5, 2.5]
"""


def write_frame(path: Path, rng: np.random.Generator, drawer: float) -> None:
    scene = rng.normal(size=24)
    scene[DRAWER] = drawer
    np.savez_compressed(
        path,
        actions=rng.normal(size=7),
        rel_actions=np.append(rng.uniform(-1, 1, 6), 1.0),
        robot_obs=rng.normal(size=15),
        scene_obs=scene,
        rgb_static=rng.integers(0, 256, (20, 20, 3), np.uint8),
        rgb_gripper=rng.integers(0, 256, (12, 12, 3), np.uint8),
        depth_static=rng.normal(size=(20, 20)).astype(np.float32),
    )


def write_split(folder: Path) -> Path:
    """A split of 22 frames as CALVIN would have written it."""
    (folder / "lang_annotations").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for first, last in EPISODES:
        for n in range(first, last + 1):
            write_frame(folder / f"episode_{n:07d}.npz", rng, 0.02 * (n - first))
    np.save(folder / "ep_start_end_ids.npy", np.array(EPISODES))
    np.save(folder / "ep_lens.npy", np.array([12, 10]))  # another order, as in the published data
    np.save(folder / "scene_info.npy", {"calvin_scene_D": [0, 40]}, allow_pickle=True)
    (folder / "statistics.yaml").write_text(STATISTICS)
    spans = [(np.int64(7), np.int64(15)), (8, 16), (20, 30), (22, 24)]
    table = {
        "language": {
            "ann": ["pull the drawer", "open it", "slide the drawer open", "shut the drawer"],
            "task": ["open_drawer", "open_drawer", "open_drawer", "close_drawer"],
            "emb": rng.normal(size=(4, 1, 384)).astype(np.float32),
        },
        "info": {"episodes": [], "indx": spans},
    }
    np.save(folder / "lang_annotations" / "auto_lang_ann.npy", table, allow_pickle=True)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def assert_same_arrays(one: Path, other: Path) -> None:
    """Same files; frames equal array for array, in order, dtype and bits; the rest byte by byte."""
    left, right = files(one), files(other)
    assert left.keys() == right.keys()
    for name in left:
        if not name.endswith(".npz"):
            assert left[name] == right[name], name
            continue
        with np.load(one / name) as a, np.load(other / name) as b:
            assert a.files == b.files
            for key in a.files:
                assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape
                assert a[key].tobytes() == b[key].tobytes(), (name, key)
