"""One object per framework, so that a test body runs over all of them.

The conversions and autodiff are those of `focal.testing.frameworks`. To add a framework: a class
there, one here, and a line in `BACKENDS`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

import focal
import focal.numpy
from focal.core import (
    anchors,
    box_losses,
    boxes,
    derivatives,
    losses,
    nms,
    softmax,
    targets,
    variants,
)
from focal.core.bind import bind
from focal.testing import frameworks

CORE = (losses, softmax, variants, box_losses, derivatives, boxes, anchors, nms, targets)
REQUIRE_ALL = os.environ.get("FOCAL_REQUIRE_ALL") == "1"
ONLY = tuple(filter(None, os.environ.get("FOCAL_BACKENDS", "").split(",")))
"""The backends to test, by name; empty: all. The tests of the others are left out."""


class Backend(frameworks.Framework):
    """focal in one framework, called with NumPy arrays."""

    array_name: ClassVar[str]
    F: Any

    @property
    def half_types(self) -> tuple[str, ...]:
        return tuple(d for d in self.dtypes if d not in ("float32", "float64"))

    def dtype(self, array: Any) -> str:
        return str(array.dtype).rpartition(".")[2]

    def grad(self, function: Callable[[Any], Any], x: Any) -> np.ndarray:
        """Autodiff gradient of the sum of function(x)."""
        return self.numpy(self.value_and_gradient(function, x)[1])

    def __call__(self, function: str, *args: Any, **kwargs: Any) -> Any:
        """A public function on NumPy arguments, with NumPy results."""
        converted = {k: self._convert(v) for k, v in kwargs.items()}
        result = getattr(self.F, function)(*map(self._convert, args), **converted)
        return tuple(map(self.numpy, result)) if isinstance(result, tuple) else self.numpy(result)

    def slope(self, function: str, x: Any, t: Any, **kwargs: Any) -> np.ndarray:
        """Gradient of the sum of a loss in its logits: autodiff, or the closed form."""
        t = self._convert(t)
        converted = {k: self._convert(v) for k, v in kwargs.items()}
        closed_form = getattr(self.F, function + "_grad", None)
        if closed_form is not None:
            return self.numpy(closed_form(self._convert(x), t, **converted))
        loss = getattr(self.F, function)
        return self.grad(lambda a: loss(a, t, **converted), self._convert(x))

    def _convert(self, value: Any) -> Any:
        return self.asarray(value) if isinstance(value, np.ndarray) else value


class NumPy(frameworks.NumPy, Backend):
    array_name = "array-like"
    F = focal.numpy

    def asarray(self, value: Any, dtype: str | None = None) -> np.ndarray:
        array = np.array(value, dtype=dtype)
        array.flags.writeable = False  # no function may write to its arguments
        return array


class ArrayApiStrict(Backend):
    name = "array_api_strict"
    dtypes = ("float32", "float64")
    array_name = "an array_api_strict array"

    def __init__(self) -> None:
        self.xp = importlib.import_module("array_api_strict")
        namespace: Any = importlib.import_module("strict_namespace")
        self.F = ModuleType("strict_focal")
        for module in CORE:
            for name in module.__all__:
                function = getattr(module, name)
                if next(iter(inspect.signature(function).parameters)) == "xp":
                    setattr(self.F, name, bind(function, namespace, self.F.__name__))

    def asarray(self, value: Any, dtype: str | None = None) -> Any:
        return self.xp.asarray(np.array(value, dtype=dtype))

    def numpy(self, array: Any) -> np.ndarray:
        return np.asarray(array)


class Torch(frameworks.Torch, Backend):
    array_name = "a torch.Tensor"

    def __init__(self) -> None:
        super().__init__()
        self.F = importlib.import_module("focal.torch")


class JAX(frameworks.JAX, Backend):
    """With 64-bit types during each call, whatever the process is set to."""

    array_name = "a JAX or NumPy array"

    def __init__(self) -> None:
        super().__init__()
        module = importlib.import_module("focal.jax")
        self.F = ModuleType(module.__name__)
        self.F.__all__ = module.__all__
        for name in module.__all__:
            public = getattr(module, name)
            wide = inspect.isfunction(public) and public.__module__ == module.__name__
            setattr(self.F, name, self._wide(public) if wide else public)

    def _wide(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wide(*args: Any, **kwargs: Any) -> Any:
            with self.scope("float64"):
                return function(*args, **kwargs)

        return wide

    def asarray(self, value: Any, dtype: str | None = None) -> Any:
        with self.scope("float64"):
            return super().asarray(value, dtype)

    def grad(self, function: Callable[[Any], Any], x: Any) -> np.ndarray:
        with self.scope("float64"):
            return super().grad(function, x)


class TensorFlow(frameworks.TensorFlow, Backend):
    array_name = "a tf.Tensor or what converts to one"

    def __init__(self) -> None:
        super().__init__()
        self.F = importlib.import_module("focal.tensorflow")

    def dtype(self, array: Any) -> str:
        return str(array.dtype.name)


BACKENDS: dict[str, type[Backend]] = {
    b.name: b for b in (NumPy, ArrayApiStrict, Torch, JAX, TensorFlow)
}
AUTODIFF = ("torch", "jax", "tensorflow")
"""The backends that differentiate the losses by themselves."""
RETINANETS = ("torch", "jax", "tensorflow")
"""The frameworks that the reference RetinaNet is written in."""
CLOSED_FORM = ("numpy", "array_api_strict")
"""The backends that offer the derivatives as functions."""


class LeftOut(pytest.skip.Exception):
    """A skip of what FOCAL_BACKENDS leaves out."""


def namespace(backend: Backend) -> Any:
    """The array operations that the core is written in."""
    if backend.name == "array_api_strict":
        return importlib.import_module("strict_namespace")
    return importlib.import_module(f"focal.{backend.name}._namespace")


def without_box_kernels(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matching and suppression by the core, where a framework has kernels for them."""
    monkeypatch.setattr(namespace(backend), "box_kernels", lambda boxes, others: None)


def left_out(name: object) -> bool:
    """Whether it is the name of a backend that FOCAL_BACKENDS does not have."""
    return bool(ONLY) and isinstance(name, str) and name in BACKENDS and name not in ONLY


def load(name: str) -> Backend:
    """The backend, or a skip where its framework is not installed or not to be tested.

    Continuous integration sets FOCAL_REQUIRE_ALL=1, and then a missing framework is an error.
    """
    if left_out(name):
        raise LeftOut(f"{name} is not one of FOCAL_BACKENDS")
    try:
        return BACKENDS[name]()
    except ModuleNotFoundError as error:
        if REQUIRE_ALL or error.name is None or error.name.startswith("focal"):
            raise
        pytest.skip(f"{error.name} is not installed")
