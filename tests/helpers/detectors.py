"""A detector small enough for tests, and what several of them need with it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from focal.core.anchors import AnchorConfig
from focal.retinanet.presets import PRESETS

CONFIG = PRESETS["tiny"].detector.replace(
    classes=("circle", "square", "triangle"),
    image_size=(64, 64),
    channels=16,
    head_depth=1,
    anchors=AnchorConfig(strides=(8, 16, 32), sizes=(12.0, 24.0, 48.0)),
)


def pictures(count: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """(count, *size, 3) random uint8 images."""
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3)).astype(np.uint8)


def assert_same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Equal bit for bit, all of them."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


def assert_near(found: np.ndarray, expected: np.ndarray, tolerance: float, name: str = "") -> None:
    """Within a share of the largest value."""
    assert found.shape == expected.shape, name
    limit = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit, err_msg=name)
