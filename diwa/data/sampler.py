"""Training windows from recorded episodes: parallel streams with carried state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from diwa.data.columns import Column
from diwa.data.store import NEUTRAL_ACTION, Episode


def previous_actions(action: np.ndarray) -> np.ndarray:
    """Actions `[T, 7]` taken after frames -> `[T + 1, 7]` that led to frames, neutral first."""
    return np.concatenate([NEUTRAL_ACTION[None], action]).astype(np.float32)


class StreamSampler:
    """Cuts all frames into B equal streams that advance T frames per batch (method section 1.8).

    Frames of the episodes are laid end to end; stream j of an epoch starts at a random offset plus
    j/B of the data and wraps around. The reset flag is set at every true episode start, so a
    window may run across a boundary without leaking state. Batch i is a pure function of (seed,
    i): resuming needs only the step number and the carried state.

    Args:
        columns: name -> one `[T_i + 1, ...]` tensor per episode, float32.
        actions: `[T_i, A]` per episode, taken after frames.
        batch_size: B.
        seq_len: T.
        seed: of the offsets and of the extra resets.
        reset_prob: probability of an extra reset flag on a frame.
        device: of the whole data set, which is kept there.
        streamed: columns of the store that do not fit in memory, such as frames; read per batch.
        rows: row of the store of every frame of the episodes, `[frames]`, for `streamed`.
        streams: the streams that `batch` returns, all by default; with `parallel.share(B)` the
            processes get the parts of the same batch.
    """

    def __init__(
        self,
        columns: dict[str, Sequence[Tensor]],
        actions: Sequence[np.ndarray],
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        reset_prob: float = 0.01,
        device: str | torch.device = "cpu",
        streamed: Mapping[str, Column] | None = None,
        rows: np.ndarray | None = None,
        streams: slice = slice(None),
    ) -> None:
        self.columns = {k: torch.cat(list(v)).to(device) for k, v in columns.items()}
        led = [torch.from_numpy(previous_actions(a)) for a in actions]
        self.action = torch.cat(led).to(device)
        first = [torch.zeros(len(a)) for a in led]
        for flags in first:
            flags[0] = 1.0
        self.first = torch.cat(first).to(device)
        self.frames = len(self.first)
        self.batch_size, self.seq_len, self.seed = batch_size, seq_len, seed
        self.reset_prob, self.device, self.streams = reset_prob, device, streams
        self.streamed = dict(streamed or {})
        self.rows = np.zeros(0, np.int64) if rows is None else rows
        if self.streamed and len(self.rows) != self.frames:
            raise ValueError(f"streamed columns need the rows of all {self.frames} frames")
        self.steps_per_epoch = max(1, self.frames // (batch_size * seq_len))

    def new_epoch(self, step: int) -> bool:
        """Whether the carried state must be dropped before this batch."""
        return step % self.steps_per_epoch == 0

    def batch(self, step: int, out: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Batch of gradient step `step`: columns and `action` `[T, B, ...]`, `reset [T, B]`.

        Streamed columns keep the dtype of the store, uint8 for pictures `[T, B, h, w, 3]`. B is the
        number of `streams`.

        Args:
            step: from 0.
            out: CPU tensors of an earlier batch, such as pinned ones, to be filled and returned;
                only where `device` is the CPU.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        offset = np.random.default_rng((self.seed, epoch)).integers(self.frames)
        stream = np.arange(self.batch_size) * (self.frames / self.batch_size)
        time = within * self.seq_len + np.arange(self.seq_len)
        index = (offset + time[:, None] + stream[None].astype(np.int64)) % self.frames
        extra = np.random.default_rng((self.seed, epoch, within)).random(index.shape)
        index = np.ascontiguousarray(index[:, self.streams])
        idx = torch.from_numpy(index).to(self.device)
        made = {k: v[idx] for k, v in self.columns.items()}
        made["action"] = self.action[idx]
        random_reset = torch.from_numpy((extra < self.reset_prob).astype(np.float32))
        random_reset = random_reset[:, self.streams].to(self.device)
        made["reset"] = torch.maximum(self.first[idx], random_reset)
        if self.new_epoch(step):
            made["reset"][0] = 1.0
        if out is not None:
            made = {k: out[k].copy_(v) for k, v in made.items()}
        for name, column in self.streamed.items():
            place = None if out is None else out[name].numpy()
            frames = torch.from_numpy(column.read(self.rows[index], place))
            made[name] = frames.to(self.device) if out is None else out[name]
        return made


def store_rows(starts: np.ndarray, lengths: np.ndarray, episodes: Sequence[int]) -> np.ndarray:
    """Rows of a store that hold the frames of some episodes, `[frames]` int64."""
    ranges = [np.arange(starts[i], starts[i] + lengths[i] + 1) for i in episodes]
    return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)


def split_episodes(episodes: Sequence[Episode], holdout: float) -> tuple[list[int], list[int]]:
    """Indices of training and held-out episodes; every k-th is held out, at least one."""
    every = max(2, round(1 / holdout)) if holdout > 0 else len(episodes) + 1
    held = [i for i in range(len(episodes)) if i % every == every - 1]
    if not held and len(episodes) > 1 and holdout > 0:
        held = [len(episodes) - 1]
    return [i for i in range(len(episodes)) if i not in set(held)], held
