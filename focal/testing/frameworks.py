"""The frameworks behind the same few methods: arrays, NumPy arrays, autodiff.

A framework is imported when its class is instantiated.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

__all__ = ["DTYPES", "FRAMEWORKS", "Framework"]

Function = Callable[..., Any]
Scope = contextlib.AbstractContextManager[Any]
DTYPES = ("float16", "bfloat16", "float32", "float64")


class Framework:
    """What a check needs of a framework."""

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    differentiates: ClassVar[bool] = True

    def scope(self, dtype: str) -> Scope:
        """A context in which the framework has arrays of the type."""
        return contextlib.nullcontext()

    def asarray(self, value: Any, dtype: str | None = None) -> Any:
        """An array of the framework; `dtype` may name a type that NumPy lacks."""
        raise NotImplementedError

    def numpy(self, array: Any) -> NDArray[Any]:
        """The array in NumPy; bfloat16 as float32, which holds it exactly."""
        raise NotImplementedError

    def compiled(self, function: Function) -> Function:
        """The function of arrays, compiled where that is the faster way to run it once."""
        return function

    def value_and_gradient(self, function: Function, x: Any, *rest: Any) -> tuple[Any, Any]:
        """function(x, *rest), and the gradient of its sum in x."""
        raise NotImplementedError


class NumPy(Framework):
    """Values only."""

    name = "numpy"
    dtypes = ("float16", "float32", "float64")
    differentiates = False

    def asarray(self, value: Any, dtype: str | None = None) -> Any:
        return np.asarray(value, dtype)

    def numpy(self, array: Any) -> NDArray[Any]:
        return np.asarray(array)


class Torch(Framework):
    """PyTorch in eager mode, on the CPU."""

    name = "torch"

    def __init__(self) -> None:
        self.torch = importlib.import_module("torch")

    def asarray(self, value: Any, dtype: str | None = None) -> Any:
        return self.torch.tensor(value, dtype=None if dtype is None else getattr(self.torch, dtype))

    def numpy(self, array: Any) -> NDArray[Any]:
        array = array.detach().cpu()
        bfloat16 = array.dtype == self.torch.bfloat16
        return np.asarray((array.float() if bfloat16 else array).numpy())

    def value_and_gradient(self, function: Function, x: Any, *rest: Any) -> tuple[Any, Any]:
        nested = x.requires_grad  # then the gradient is differentiated again
        leaf = x if nested else x.detach().clone().requires_grad_()
        value = function(leaf, *rest)
        ones = self.torch.ones_like(value)
        return value, self.torch.autograd.grad(value, leaf, ones, create_graph=nested)[0]


class JAX(Framework):
    """JAX; a function that cannot be traced runs without compilation."""

    name = "jax"

    def __init__(self) -> None:
        self.jax = importlib.import_module("jax")

    def scope(self, dtype: str) -> Scope:
        if dtype != "float64":
            return contextlib.nullcontext()
        if hasattr(self.jax, "enable_x64"):
            return cast(Scope, self.jax.enable_x64(True))
        return cast(Scope, importlib.import_module("jax.experimental").enable_x64())  # before 0.8

    def asarray(self, value: Any, dtype: str | None = None) -> Any:
        return self.jax.numpy.asarray(value, dtype)

    def numpy(self, array: Any) -> NDArray[Any]:
        return np.asarray(array, np.float32 if array.dtype == self.jax.numpy.bfloat16 else None)

    def compiled(self, function: Function) -> Function:
        jitted, errors = self.jax.jit(function), self.jax.errors

        def run(*arrays: Any) -> Any:
            try:
                return jitted(*arrays)
            except (errors.JAXTypeError, errors.JAXIndexError):
                return function(*arrays)

        return run

    def value_and_gradient(self, function: Function, x: Any, *rest: Any) -> tuple[Any, Any]:
        value, pull_back = self.jax.vjp(lambda x: function(x, *rest), x)
        return value, pull_back(self.jax.numpy.ones_like(value))[0]


class TensorFlow(Framework):
    """TensorFlow in eager mode."""

    name = "tensorflow"

    def __init__(self) -> None:
        self.tf = importlib.import_module("tensorflow")

    def asarray(self, value: Any, dtype: str | None = None) -> Any:
        if dtype is not None:  # converted in NumPy, because tf.cast may flush subnormal numbers
            with np.errstate(invalid="ignore"):  # NaN to bfloat16
                value = np.asarray(value).astype(self.tf.as_dtype(dtype).as_numpy_dtype)
        return self.tf.convert_to_tensor(value)

    def numpy(self, array: Any) -> NDArray[Any]:
        bfloat16 = array.dtype == "bfloat16"
        return np.asarray((self.tf.cast(array, "float32") if bfloat16 else array).numpy())

    def value_and_gradient(self, function: Function, x: Any, *rest: Any) -> tuple[Any, Any]:
        with self.tf.GradientTape() as tape:
            tape.watch(x)
            value = function(x, *rest)
        gradient = tape.gradient(value, x)
        if gradient is None:
            raise LookupError("the loss has no gradient in the logits")
        return value, gradient


FRAMEWORKS: dict[str, type[Framework]] = {f.name: f for f in (NumPy, Torch, JAX, TensorFlow)}
