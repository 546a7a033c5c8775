"""Weights files: safetensors with the config inside, the same for every framework.

Names and layouts are those of torchvision's RetinaNet, convolutions (out, in, height, width).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from focal.files import write_atomically
from focal.retinanet.config import RetinaNetConfig

__all__ = [
    "check_names",
    "is_ours",
    "load_weights",
    "part",
    "read_tensors",
    "save_weights",
    "write_tensors",
]

FORMAT = "focal.retinanet"
VERSION = "1"


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


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], RetinaNetConfig]:
    """Read a file of `save_weights`.

    Returns:
        The arrays by name, and the config.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a complete weights file of this library, in a version known here.
    """
    tensors, metadata = read_tensors(path, FORMAT)
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
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file of some kind: the arrays by name, and the metadata."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file of format {kind!r}; found none")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole safetensors file; {error}") from error
    found = metadata.get("format"), metadata.get("version")
    if found != (kind, VERSION):
        raise ValueError(
            f"{path}: expected format {kind!r}, version {VERSION!r}, in the metadata; "
            f"found format {found[0]!r}, version {found[1]!r}"
        )
    return tensors, metadata


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
