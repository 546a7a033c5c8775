"""Weights files: safetensors with the config inside, the same for every framework.

Names and layouts are those of torchvision's RetinaNet, convolutions (out, in, height, width).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from focal.files import write_atomically
from focal.retinanet.config import RetinaNetConfig

__all__ = [
    "CHECKPOINT_FORMAT",
    "check_names",
    "checkpoints",
    "is_ours",
    "load_weights",
    "part",
    "read_checkpoint",
    "read_safetensors",
    "read_tensors",
    "save_weights",
    "write_tensors",
]

FORMAT = "focal.retinanet"
CHECKPOINT_FORMAT = "focal.checkpoint"
VERSION = "1"

_log = logging.getLogger(__name__)


def save_weights(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], config: RetinaNetConfig
) -> None:
    """Write the tensors and the config to a file, whole or not at all.

    Args:
        path: the file, replaced if it exists. Its folder must exist.
        tensors: arrays by name, in any memory layout.
        config: the detector that they belong to.
    """
    write_tensors(path, tensors, FORMAT, {"config": config.to_json()})


def load_weights(source: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], RetinaNetConfig]:
    """Read the weights of a detector: what `save_weights` or a run wrote.

    Args:
        source: As in `focal.retinanet.load`.

    Returns:
        The arrays by name, and the config.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a complete file of this library, in a version known here, or it is a
            checkpoint of a version that did not store the config.
    """
    path = Path(source)
    if path.is_dir():
        names = ("best.safetensors", "weights.safetensors")
        path = next((path / name for name in names if (path / name).is_file()), path)
    if path.is_dir():
        if not checkpoints(path):
            raise FileNotFoundError(
                f"{path}: expected a run folder, with {', '.join(names)} or a checkpoint; "
                "found none of them"
            )
        path, tensors, metadata = read_checkpoint(path)
    else:
        tensors, metadata = read_tensors(path, FORMAT, CHECKPOINT_FORMAT)
    if metadata["format"] == CHECKPOINT_FORMAT:
        if "config" not in metadata:
            raise ValueError(
                f"{path}: a checkpoint of an older version, without the detector's config; "
                "expected one that has it, or weights.safetensors of its run"
            )
        tensors = part(tensors, "model/") | part(tensors, "average/")
    try:
        return tensors, RetinaNetConfig.from_json(metadata["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a RetinaNetConfig inside; {error!r}") from error


def is_ours(path: str | os.PathLike[str]) -> bool:
    """Whether this is a safetensors file that this library wrote."""
    try:
        with safe_open(path, framework="numpy") as file:
            return str((file.metadata() or {}).get("format", "")).startswith("focal.")
    except (OSError, SafetensorError):
        return False


def read_checkpoint(folder: Path) -> tuple[Path, dict[str, np.ndarray], dict[str, str]]:
    """The newest checkpoint of a run folder that is whole: its path, tensors and metadata.

    Raises:
        FileNotFoundError: there is none.
        ValueError: none of them is whole.
    """
    paths = checkpoints(folder)
    if not paths:
        raise FileNotFoundError(f"{folder}: expected a checkpoint-*.safetensors; found none")
    damage = []
    for path in reversed(paths):
        try:
            tensors, metadata = read_tensors(path, CHECKPOINT_FORMAT)
        except ValueError as error:
            damage.append(str(error))
            continue
        for text in damage:
            _log.warning("%s; taking %s", text, path.name)
        return path, tensors, metadata
    raise ValueError("; ".join(damage))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    found = {}
    for path in folder.glob("checkpoint-*.safetensors"):
        step = path.stem.removeprefix("checkpoint-")
        if step.isdecimal():
            found[int(step)] = path
    return [found[step] for step in sorted(found)]


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    kind: str,
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file of some kind, whole or not at all."""
    # safetensors writes the buffer of an array as it lies.
    data = save(
        {name: np.asarray(x, order="C") for name, x in tensors.items()},
        {"format": kind, "version": VERSION, **metadata},
    )
    # The order of its metadata varies by process; sorted, the same content gives the same file.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    write_atomically(path, len(header).to_bytes(8, "little"), header, memoryview(data)[end:])


def read_tensors(
    path: str | os.PathLike[str], *kinds: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file of one of the kinds: the arrays by name, and the metadata."""
    path, formats = Path(path), " or ".join(map(repr, kinds))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file of format {formats}; found none")
    tensors, metadata = read_safetensors(path)
    found = metadata.get("format"), metadata.get("version")
    if found not in [(kind, VERSION) for kind in kinds]:
        raise ValueError(
            f"{path}: expected format {formats}, version {VERSION!r}, in the metadata; "
            f"found format {found[0]!r}, version {found[1]!r}"
        )
    return tensors, metadata


def read_safetensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read any safetensors file: the arrays by name, and the metadata."""
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file; {error}") from error


def check_names(tensors: Mapping[str, np.ndarray], expected: Mapping[str, Sequence[int]]) -> None:
    """Check that the tensors are those of a network, by name and shape.

    Args:
        tensors: arrays by name.
        expected: the shapes of the network's tensors by name.

    Raises:
        ValueError: a name is missing or unexpected, or a shape differs.
    """
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} for {tuple(shape)}"
            for name, shape in expected.items()
            if name in tensors and tuple(tensors[name].shape) != tuple(shape)
        ],
    }
    found = [
        f"{len(names)} {problem} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for problem, names in problems.items()
        if names
    ]
    if found:
        raise ValueError(f"the weights are not those of this network: {'; '.join(found)}")


def part(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The tensors whose names begin with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
