"""How fast a store's frames are read, and whether reading makes the process grow.

Writes a store of synthetic two-camera frames and reads one epoch of training windows from it, as
`StreamSampler` does, on one thread. `cold` starts with the file dropped from the page cache. Every
window is compared with the file's content (each frame carries its number). The bar: 5,000
two-camera 64 x 64 frames a second, and no growth of the process over the epoch.

    python benchmarks/store_reader.py [--frames 60000] [--folder DIR]
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from diwa.data.sampler import StreamSampler, store_rows
from diwa.data.store import EpisodeStore
from diwa.data.writer import Layout, StoreWriter

CAMERAS = ("rgb_static", "rgb_gripper")
SIZE, BATCH, WINDOW, EPISODE = 64, 16, 50, 500
RESULT = Path(__file__).parent / "results" / "store_reader.json"


def make_store(folder: Path, frames: int) -> EpisodeStore:
    """A store of random frames; the first eight bytes of a picture are its number."""
    episodes = frames // EPISODE
    layout = Layout(
        lengths=[EPISODE - 1] * episodes,
        tasks=[""] * episodes,
        columns={camera: ("uint8", (SIZE, SIZE, 3)) for camera in CAMERAS},
        source={},
    )
    writer = StoreWriter(folder / "store", layout)
    rng = np.random.default_rng(0)
    for first in range(0, frames, EPISODE):
        number = np.arange(first, first + EPISODE)
        rows = {"robot_obs": np.repeat(number[:, None], 15, 1).astype(np.float32)}
        for camera in CAMERAS:
            pictures = rng.integers(0, 256, (EPISODE, SIZE * SIZE * 3), np.uint8)
            pictures[:, :8] = number.astype("<i8")[:, None].view(np.uint8)
            rows[camera] = pictures.reshape(EPISODE, SIZE, SIZE, 3)
        writer.write(first, rows)
        writer.commit(first + EPISODE)
    return writer.finish()


def memory() -> dict[str, int]:
    """Resident memory of this process in kB: private, and mapped from files."""
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return {name: int(fields[name].split()[0]) for name in ("VmRSS", "RssAnon", "RssFile")}


def settled_memory(store: EpisodeStore) -> dict[str, int]:
    """Memory without the pages that the next release would hand back."""
    for camera in CAMERAS:
        store.columns[camera].release()
    return memory()


def drop_from_cache(store: EpisodeStore) -> None:
    for camera in CAMERAS:
        store.columns[camera].release()
        with open(store.path / f"{camera}.npy", "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def epoch(store: EpisodeStore) -> dict[str, object]:
    """Read every frame once in windows `[50, 16]`."""
    episodes = list(range(len(store)))
    sampler = StreamSampler(
        {"robot_obs": [torch.from_numpy(np.array(store[i].robot_obs[:, :1])) for i in episodes]},
        [store[i].action for i in episodes],
        batch_size=BATCH,
        seq_len=WINDOW,
        seed=0,
        streamed={camera: store.columns[camera] for camera in CAMERAS},
        rows=store_rows(store.starts, store.lengths, episodes),
    )
    for step in range(2):  # a batch is held while the next one is read
        batch = sampler.batch(step)
    before = settled_memory(store)
    steps, wrong, highest = sampler.steps_per_epoch, 0, before["VmRSS"]
    wall, cpu, checking = time.perf_counter(), time.process_time(), 0.0
    for step in range(steps):
        batch = sampler.batch(step)
        pause = time.process_time()
        number = batch["robot_obs"][..., 0].long()
        for camera in CAMERAS:
            head = batch[camera].reshape(WINDOW, BATCH, -1)[..., :8].contiguous().view(torch.int64)
            wrong += int((head[..., 0] != number).sum())
        if step % 10 == 0:
            highest = max(highest, memory()["VmRSS"])
        checking += time.process_time() - pause
    wall, cpu = time.perf_counter() - wall - checking, time.process_time() - cpu - checking
    after, frames = settled_memory(store), steps * BATCH * WINDOW
    return {
        "two_camera_frames": frames,
        "wall_s": round(wall, 3),
        "cpu_s": round(cpu, 3),
        "frames_per_s_wall": round(frames / wall),
        "frames_per_cpu_s": round(frames / cpu),
        "wrong_frames": wrong,
        "memory_kb_before": before,
        "memory_kb_after": after,
        "memory_kb_highest": highest,
        "growth_kb": after["VmRSS"] - before["VmRSS"],
        "private_growth_kb": after["RssAnon"] - before["RssAnon"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=60_000, help="two-camera frames [60000]")
    parser.add_argument("--folder", type=Path, help="where to put the temporary store")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        store = make_store(Path(folder), arguments.frames - arguments.frames % EPISODE)
        size = sum((store.path / f"{camera}.npy").stat().st_size for camera in CAMERAS)
        load = os.getloadavg()
        epochs = []
        drop_from_cache(store)
        for i in range(arguments.epochs):
            epochs.append({"cache": "warm" if i else "cold", **epoch(store)})
            print(json.dumps(epochs[-1]))
        result = {
            "what": "two-camera 64 x 64 uint8 frames per second, one thread, windows [50, 16]",
            "bar": {"frames_per_s_per_core": 5000, "growth_over_an_epoch": "none"},
            "store_bytes": size,
            "epochs": epochs,
            "note": "frames_per_cpu_s is what one core does; wall time includes waiting for a core "
            "and for the disk. memory_kb_highest includes pages not yet handed back.",
            "load_average_before_after": [round(load[0], 2), round(os.getloadavg()[0], 2)],
            "cores": os.cpu_count(),
            "machine": platform.processor() or platform.machine(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "commit": commit,
        }
    wrong = sum(int(e["wrong_frames"]) for e in epochs)
    if wrong:
        raise SystemExit(f"{wrong} frames differ from the file: no result written")
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {RESULT}")


if __name__ == "__main__":
    main()
