"""Errors that a person can act on: the message names the thing that is wrong and the way out."""

from __future__ import annotations


class DiwaError(Exception):
    """Base of every error that the command line shows as a short message."""


class RunError(DiwaError):
    """A run folder or a phase: other settings, missing result, a metric that is not finite."""


class CheckpointError(DiwaError):
    """A checkpoint that is missing, damaged or of another architecture."""


class StoreError(DiwaError):
    """An episode store that is missing, truncated or of the wrong shape."""


class DeviceError(DiwaError):
    """A device that cannot be used: no GPU, an old driver, an unsupported architecture."""


class DeviceMemoryError(DeviceError):
    """A GPU has not enough memory; the message says what would fit."""


class SimulatorError(DiwaError):
    """A simulator that is missing, or that cannot be started here."""
