"""Anchors: how many, in which order, where, of what size."""

from __future__ import annotations

import math

import numpy as np
import pytest
from backends import Backend
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from focal import AnchorConfig

STRIDES = (8, 16, 32, 64, 128)


def centers_and_sides(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]


@given(st.integers(1, 300), st.integers(1, 300))
def test_count(backend: Backend, height: int, width: int) -> None:
    boxes = backend("anchors", (height, width))
    cells = sum(math.ceil(height / s) * math.ceil(width / s) for s in STRIDES)
    assert boxes.shape == (9 * cells, 4)
    assert boxes.dtype == np.float32


def test_order_is_levels_rows_columns_ratios_scales(backend: Backend) -> None:
    """Against plain loops, on an image that no stride divides."""
    height, width = 70, 131
    expected = []
    for stride, size in zip(STRIDES, (32, 64, 128, 256, 512), strict=True):
        for row in range(math.ceil(height / stride)):
            for column in range(math.ceil(width / stride)):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                for ratio in (0.5, 1.0, 2.0):
                    for scale in (1, 2 ** (1 / 3), 2 ** (2 / 3)):
                        w, h = size * scale / ratio**0.5, size * scale * ratio**0.5
                        expected.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    assert_allclose(backend("anchors", (height, width)), expected, rtol=1e-6, atol=1e-5)


def test_sizes_are_those_of_the_paper(backend: Backend) -> None:
    """Areas of 32^2 to 512^2 times the scales, height / width 1:2, 1:1, 2:1; 32 to 813 px."""
    _, sides = centers_and_sides(backend("anchors", (64, 64)).astype(float))
    root_area = np.sqrt(sides.prod(1))
    assert root_area.min() == pytest.approx(32, rel=1e-6)
    assert root_area.max() == pytest.approx(812.75, rel=1e-5)
    octaves = np.log2(root_area / 32) * 3
    assert_allclose(octaves, np.round(octaves), atol=1e-4)
    assert set(np.round(octaves)) == set(range(15))
    ratios = (sides[:, 1] / sides[:, 0]).reshape(-1, 3, 3)  # cells, ratios, scales
    assert_allclose(ratios, np.broadcast_to([[0.5], [1], [2]], ratios.shape), rtol=1e-5)


@pytest.mark.parametrize(("offset", "first"), [(0.5, 4.0), (0.0, 0.0)])
def test_offset_places_the_center(backend: Backend, offset: float, first: float) -> None:
    config = AnchorConfig(strides=(8,), sizes=(32,), offset=offset)
    centers, _ = centers_and_sides(backend("anchors", (16, 24), config))
    assert_allclose(centers[0], [first, first], atol=1e-5)
    assert_allclose(centers[9], [first + 8, first], atol=1e-5)  # the next column
    assert_allclose(centers[27], [first, first + 8], atol=1e-5)  # the next row


def test_own_config(backend: Backend) -> None:
    config = AnchorConfig(strides=[4, 10], sizes=[6, 20.0], scales=[1], ratios=[1, 4])
    boxes = backend("anchors", (9, 10), config)
    assert config.per_cell == 2
    assert boxes.shape == (2 * (3 * 3 + 1), 4)
    assert_allclose(boxes[0], [-1, -1, 5, 5], atol=1e-6)
    assert_allclose(boxes[1], [0.5, -4, 3.5, 8], atol=1e-6)  # half as wide, twice as high
    assert_allclose(boxes[-2], [-5, -5, 15, 15], atol=1e-6)


def test_rounded_is_that_of_torchvision(backend: Backend) -> None:
    """torchvision truncates 32, 40.3 and 50.8 to 32, 40, 50, and rounds half the sides."""
    config = AnchorConfig(strides=(8,), sizes=(32,), offset=0.0, rounded=True)
    expected = [
        [-23, -11, 23, 11],
        [-28, -14, 28, 14],
        [-35, -18, 35, 18],
        [-16, -16, 16, 16],
        [-20, -20, 20, 20],
        [-25, -25, 25, 25],
        [-11, -23, 11, 23],
        [-14, -28, 14, 28],
        [-18, -35, 18, 35],
    ]
    assert_array_equal(backend("anchors", (8, 8), config), np.array(expected, np.float32))


def test_stretched_is_that_of_torchvision(backend: Backend) -> None:
    """Cells of 800 x 1088 pixels: 61 x 64 on P6, 114 x 120 on P7, of whole pixels."""
    config = AnchorConfig(
        strides=(32, 64, 128), sizes=(32,) * 3, scales=(1,), ratios=(1,), offset=0, stretched=True
    )
    centers, _ = centers_and_sides(backend("anchors", (800, 1088), config))
    expected = [
        (x * right, y * down)
        for rows, columns, down, right in ((25, 34, 32, 32), (13, 17, 61, 64), (7, 9, 114, 120))
        for y in range(rows)
        for x in range(columns)
    ]
    assert_array_equal(centers, np.array(expected, np.float32))


def test_config_is_a_value() -> None:
    config = AnchorConfig(strides=[8], sizes=[32])
    assert config == AnchorConfig(strides=(8,), sizes=(32,))
    assert hash(config) == hash(AnchorConfig(strides=(8,), sizes=(32,)))
    with pytest.raises(AttributeError):
        config.offset = 0.0  # type: ignore[misc]
