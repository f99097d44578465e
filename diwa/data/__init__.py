"""Episodes: storage, sampling, collection."""

from diwa.data.store import Episode, EpisodeStore, write_store

__all__ = ["Episode", "EpisodeStore", "write_store"]
