"""Opening other people's torch files without running anything in them.

`torch.load(weights_only=True)` refuses every name but those of tensors. Checkpoints of Lightning
also carry their configuration, as objects of OmegaConf; these few class names are mapped to an
inert placeholder, so that the weights beside them can be read. Nothing is imported for them.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

# Classes that only describe a configuration; nothing that builds or calls things is among them.
_CONFIGURATION = re.compile(
    r"omegaconf\.(dictconfig\.DictConfig|listconfig\.ListConfig|base\.(Container)?Metadata"
    r"|nodes\.(Any|Integer|Float|String|Boolean|Bytes|Path|Enum)Node)"
    r"|typing\.(Any|Union|Optional|List|Dict)"
    r"|builtins\.(dict|list|tuple|int|float|str|bool)|__builtin__\.(dict|list|int|float|unicode)"
    r"|collections\.defaultdict"
    r"|(pytorch_)?lightning(\.pytorch|_fabric|\.fabric)?\.utilities\.(parsing|data)\.AttributeDict"
    r"|pathlib\.(Posix|Windows)Path"
)


class _Placeholder(dict):
    """Stands for an object of a configuration; keeps nothing and does nothing."""

    def __new__(cls, *arguments: object, **keywords: object) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *arguments: object, **keywords: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


def load_foreign(path: str | Path) -> Any:
    """Content of a torch file: dicts, lists, numbers and tensors on the CPU.

    Raises:
        CheckpointError: it is missing or damaged, or wants to load anything but tensors and a
            configuration; then nothing of it has been executed.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        unknown = _names(path)
    except Exception as error:  # a damaged archive can fail in any way
        raise CheckpointError(f"{path} is truncated or no torch checkpoint ({error})") from None
    refused = sorted(name for name in unknown if not _CONFIGURATION.fullmatch(name))
    if refused:
        raise CheckpointError(
            f"{path} is refused: it wants to load {', '.join(refused[:4])}, which weights never "
            "need; nothing was executed. Save a state_dict of tensors instead."
        )
    placeholders: list[Any] = [(_Placeholder, name) for name in unknown]
    try:
        with torch.serialization.safe_globals(placeholders), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is refused ({reason}); nothing was executed") from None
    except Exception as error:
        raise CheckpointError(f"{path} is truncated or no torch checkpoint ({error})") from None


def _names(path: Path) -> list[str]:
    """Names that the pickle in `path` wants and weights-only loading does not know."""
    if not zipfile.is_zipfile(path):
        return []  # the format before torch 1.6: weights-only loading alone decides
    return torch.serialization.get_unsafe_globals_in_checkpoint(path)


def state_dict(
    content: Any, path: Path, containers: Sequence[str]
) -> tuple[str, dict[str, Tensor]]:
    """The named tensors of a checkpoint and the container (`""`: none) they were found in.

    Args:
        content: what `load_foreign` returned.
        path: for messages.
        containers: keys to look under, the preferred first.

    Raises:
        CheckpointError: there are no named tensors.
    """
    if isinstance(content, Mapping):
        for key in containers:
            if isinstance(content.get(key), Mapping) and _tensors(content[key]):
                return key, _tensors(content[key])
        if _tensors(content):
            return "", _tensors(content)
    found = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
    raise CheckpointError(
        f"{path} holds no weights under {', '.join(containers)} or at its top (found: {found})"
    )


def _tensors(values: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(k): v for k, v in values.items() if isinstance(v, Tensor)}
