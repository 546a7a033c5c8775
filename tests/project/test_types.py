"""The types that a user's checker and editor see.

mypy checks this file as well (`make lint`). It reads `assert_type`, and wants an error where one is
ignored.
"""

from __future__ import annotations

import inspect
from typing import Any, assert_type, get_args, get_type_hints

import numpy as np
import pytest
from numpy.typing import NDArray

import focal.numpy


def test_hints_name_the_arrays_of_the_framework(backend: Any) -> None:
    array, module = backend.asarray(np.zeros(3, np.float32)), backend.F.__name__
    public = [getattr(backend.F, name, None) for name in focal.numpy.__all__]
    bound = [f for f in public if getattr(f, "__module__", None) == module]
    assert len(bound) >= 24
    for function in bound:
        result = get_type_hints(function)["return"]
        assert all(isinstance(array, kind) for kind in get_args(result) or [result])


def test_every_public_name_has_hints(backend: Any) -> None:
    for name in getattr(backend.F, "__all__", ()):
        public = getattr(backend.F, name)
        function = public.__init__ if inspect.isclass(public) else public
        parameters = inspect.signature(function).parameters
        assert set(parameters) - {"self"} <= set(get_type_hints(function)), name


def test_numpy() -> None:
    loss = focal.numpy.sigmoid_focal_loss([0.0, 1.0], np.zeros(2), [0.1, 0.2], gamma=1)
    assert_type(loss, NDArray[Any])
    assert_type(focal.numpy.xp.array_type, type[NDArray[Any]])


def test_torch() -> None:
    pytest.importorskip("torch")
    import torch

    import focal.torch as F

    x, labels = torch.zeros(6, 3), torch.zeros(6, dtype=torch.int64)
    assert_type(F.sigmoid_focal_loss(x, x, gamma=torch.tensor(2.0)), torch.Tensor)
    assert_type(F.sparse_sigmoid_focal_loss(x, labels, reduction="positives"), torch.Tensor)
    assert_type(F.anchors((64, 64)), torch.Tensor)
    boxes = torch.ones(2, 4)
    assert_type(F.assign_targets(boxes, boxes, labels[:2]), tuple[torch.Tensor, torch.Tensor])
    assert_type(F.SoftmaxFocalLoss(alpha=[1, 2, 3]).forward(x, labels), torch.Tensor)
    assert_type(F.num_positives(labels), torch.Tensor)
    assert_type(F.xp.array_type, type[torch.Tensor])
    with pytest.raises(TypeError):
        F.sigmoid_focal_loss([0.0], x)  # type: ignore[arg-type]
    with pytest.raises(ValueError):
        F.sigmoid_focal_loss(x, x, reduction="avg")  # type: ignore[arg-type]


def test_jax() -> None:
    pytest.importorskip("jax")
    import jax

    import focal.jax as F

    x, labels = np.zeros((6, 3), np.float32), np.zeros(6, np.int32)
    assert_type(F.sigmoid_focal_loss(x, jax.numpy.asarray(x)), jax.Array)
    assert_type(F.softmax_focal_loss(x, labels), jax.Array)
    assert_type(F.match_anchors(np.ones((2, 4)), np.ones((2, 4))), jax.Array)
    assert_type(F.num_positives(labels), jax.Array)
    with pytest.raises(TypeError):
        F.sigmoid_focal_loss([0.0], x)  # type: ignore[arg-type]
