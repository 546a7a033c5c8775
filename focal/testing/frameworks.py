"""The frameworks, each behind the same few methods, imported when one is made.

A loss is a function of logits and targets. `value_and_gradient` gives what it returns and the
gradient of the sum; `second` the gradient of the sum of picked gradients.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

import focal.numpy

__all__ = ["DTYPES", "FRAMEWORKS", "Framework"]

Loss = Callable[[Any, Any], Any]
Both = Callable[[Any, Any], tuple[Any, Any]]
Scope = contextlib.AbstractContextManager[Any]
DTYPES = ("float16", "bfloat16", "float32", "float64")


class Framework:
    """A framework computing in one floating-point type."""

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = DTYPES
    differentiates: ClassVar[bool] = True
    chunk: ClassVar[int] = 1 << 17
    """Logits to give it at once where there are many: enough that calling it costs little."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def scope(self) -> Scope:
        """What every use of the framework happens in."""
        return contextlib.nullcontext()

    def array(self, values: NDArray[Any]) -> Any:
        """Numbers in the type of the framework; integers as they are."""
        raise NotImplementedError

    def from_bits(self, bits: NDArray[Any]) -> Any:
        """Numbers of the type from their bit patterns, uint16 or uint32."""
        raise NotImplementedError

    def numpy(self, array: Any) -> NDArray[Any]:
        """In NumPy; half types as float32, which holds them exactly."""
        raise NotImplementedError

    def value(self, loss: Loss, x: Any, t: Any) -> Any:
        """loss(x, t), where no gradient is asked for."""
        return loss(x, t)

    def shape(self, loss: Loss, x: Any, t: Any) -> tuple[int, ...]:
        """That of loss(x, t)."""
        return self.numpy(loss(x, t)).shape

    def value_and_gradient(self, loss: Loss, x: Any, t: Any) -> tuple[Any, Any]:
        """loss(x, t) and the gradient of its sum in x."""
        raise NotImplementedError

    def second(self, loss: Loss, x: Any, t: Any, pick: Any) -> Any:
        """The gradient in x of sum(pick * gradient)."""
        raise NotImplementedError

    def own_loss(self, alpha: float | None, gamma: float) -> Both:
        """The library's sigmoid focal loss and its gradient, as this framework is best used."""
        loss = importlib.import_module(f"focal.{self.name}").sigmoid_focal_loss
        return lambda x, t: self.value_and_gradient(lambda x, t: loss(x, t, alpha, gamma), x, t)


class NumPy(Framework):
    """Values only; of the library's own loss also the closed-form gradient."""

    name = "numpy"
    dtypes = ("float16", "float32", "float64")
    differentiates = False
    chunk = 1 << 12  # so small that memory for the temporaries is not asked for anew

    def array(self, values: NDArray[Any]) -> Any:
        return values if values.dtype.kind == "i" else values.astype(self.dtype)

    def from_bits(self, bits: NDArray[Any]) -> Any:
        return bits.view(self.dtype)

    def numpy(self, array: Any) -> NDArray[Any]:
        return np.asarray(array)

    def own_loss(self, alpha: float | None, gamma: float) -> Both:
        return lambda x, t: (
            focal.numpy.sigmoid_focal_loss(x, t, alpha, gamma),
            focal.numpy.sigmoid_focal_loss_grad(x, t, alpha, gamma),
        )


class Torch(Framework):
    """PyTorch in eager mode, on the CPU."""

    name = "torch"

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)
        self.torch = importlib.import_module("torch")
        self.type = getattr(self.torch, dtype)

    def array(self, values: NDArray[Any]) -> Any:
        array = self.torch.tensor(values)
        return array if values.dtype.kind == "i" else array.to(self.type)

    def from_bits(self, bits: NDArray[Any]) -> Any:
        return self.torch.from_numpy(bits.view(f"int{8 * bits.itemsize}")).view(self.type)

    def numpy(self, array: Any) -> NDArray[Any]:
        array = array.detach().cpu()
        half = array.dtype in (self.torch.float16, self.torch.bfloat16)
        return np.asarray((array.float() if half else array).numpy())

    def value_and_gradient(self, loss: Loss, x: Any, t: Any) -> tuple[Any, Any]:
        x = x.detach().requires_grad_()
        value = loss(x, t)
        return value, self.torch.autograd.grad(value, x, self.torch.ones_like(value))[0]

    def second(self, loss: Loss, x: Any, t: Any, pick: Any) -> Any:
        x = x.detach().requires_grad_()
        value = loss(x, t)
        ones = self.torch.ones_like(value)
        (gradient,) = self.torch.autograd.grad(value, x, ones, create_graph=True)
        return self.torch.autograd.grad(gradient, x, pick)[0]


class JAX(Framework):
    """JAX; with 64-bit types switched on while it works in float64.

    A loss is compiled as a whole, which takes less time than to compile its operations one by
    one; one that cannot be traced runs as it is.
    """

    name = "jax"

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)
        self.jax = importlib.import_module("jax")
        self.jnp = self.jax.numpy

    def scope(self) -> Scope:
        if self.dtype != "float64":
            return super().scope()
        if hasattr(self.jax, "enable_x64"):
            return cast(Scope, self.jax.enable_x64(True))
        return cast(Scope, importlib.import_module("jax.experimental").enable_x64())

    def array(self, values: NDArray[Any]) -> Any:
        kind = "int32" if values.dtype.kind == "i" else self.dtype
        return self.jnp.asarray(values, kind)

    def from_bits(self, bits: NDArray[Any]) -> Any:
        return self.jax.lax.bitcast_convert_type(self.jnp.asarray(bits), self.dtype)

    def numpy(self, array: Any) -> NDArray[Any]:
        half = array.dtype.itemsize == 2
        return np.asarray(array, np.float32 if half else None)

    def value(self, loss: Loss, x: Any, t: Any) -> Any:
        return self._compiled(loss, x, t)

    def shape(self, loss: Loss, x: Any, t: Any) -> tuple[int, ...]:
        return tuple(self._traced(self.jax.eval_shape, loss, x, t).shape)

    def value_and_gradient(self, loss: Loss, x: Any, t: Any) -> tuple[Any, Any]:
        def both(x: Any, t: Any) -> tuple[Any, Any]:
            value, pull_back = self.jax.vjp(lambda x: loss(x, t), x)
            return value, pull_back(self.jnp.ones_like(value))[0]

        return cast(tuple[Any, Any], self._compiled(both, x, t))

    def second(self, loss: Loss, x: Any, t: Any, pick: Any) -> Any:
        def bend(x: Any, t: Any, pick: Any) -> Any:
            _, pull_back = self.jax.vjp(lambda x: self.value_and_gradient(loss, x, t)[1], x)
            return pull_back(pick)[0]

        return self._compiled(bend, x, t, pick)

    def _compiled(self, function: Callable[..., Any], *arrays: Any) -> Any:
        return self._traced(lambda f, *a: self.jax.jit(f)(*a), function, *arrays)

    def _traced(self, how: Callable[..., Any], function: Callable[..., Any], *arrays: Any) -> Any:
        errors = self.jax.errors
        try:
            return how(function, *arrays)
        except (errors.JAXTypeError, errors.JAXIndexError):
            return function(*arrays)

    def own_loss(self, alpha: float | None, gamma: float) -> Both:
        return cast(Both, self.jax.jit(super().own_loss(alpha, gamma)))


class TensorFlow(Framework):
    """TensorFlow; the library's own loss in a `tf.function`."""

    name = "tensorflow"

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype)
        self.tf = importlib.import_module("tensorflow")

    def array(self, values: NDArray[Any]) -> Any:
        tensor = self.tf.convert_to_tensor(values)
        return tensor if values.dtype.kind == "i" else self.tf.cast(tensor, self.dtype)

    def from_bits(self, bits: NDArray[Any]) -> Any:
        return self.tf.bitcast(self.tf.convert_to_tensor(bits), self.dtype)

    def numpy(self, array: Any) -> NDArray[Any]:
        half = array.dtype.size == 2
        return np.asarray((self.tf.cast(array, "float32") if half else array).numpy())

    def value_and_gradient(self, loss: Loss, x: Any, t: Any) -> tuple[Any, Any]:
        with self.tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(x, t)
        gradient = tape.gradient(value, x)
        if gradient is None:
            raise LookupError("no gradient reaches the logits")
        return value, gradient

    def second(self, loss: Loss, x: Any, t: Any, pick: Any) -> Any:
        return self.value_and_gradient(
            lambda x, t: pick * self.value_and_gradient(loss, x, t)[1], x, t
        )[1]

    def own_loss(self, alpha: float | None, gamma: float) -> Both:
        function = super().own_loss(alpha, gamma)
        return cast(Both, self.tf.function(function, autograph=False, reduce_retracing=True))


FRAMEWORKS: dict[str, type[Framework]] = {f.name: f for f in (NumPy, Torch, JAX, TensorFlow)}
