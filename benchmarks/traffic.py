"""Kernel launches, memory traffic and waits of PyTorch code, counted on fake CUDA tensors.

`python -m benchmarks.traffic` counts training steps, target assignment and post-processing of `r50`
and writes results/traffic.json.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import focal.torch
from benchmarks.common import record, table
from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.data import Batch
from focal.retinanet.postprocess import detections
from focal.retinanet.presets import PRESETS
from focal.retinanet.torch.network import build_network
from focal.retinanet.torch.trainer import Trainer
from focal.torch import _namespace, _pointwise

__all__ = ["Traffic", "counted", "example_batch", "fake_cuda", "trainer_on"]

WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
"""Operations of which the host needs a result, so that it waits for the device."""
ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
COPYING = {"_to_copy", "copy_"}
BOXES = 41
"""Boxes of each image."""


class Traffic(TorchDispatchMode):
    """Counts the operations on CUDA tensors while it is entered.

    Attributes:
        launches: Operations that run a kernel, by name. One on a list of tensors counts once.
        bytes: What these read and write, by name: each operand and each result once.
        waits: Operations at which the host waits for the device, by name: those whose result it
            needs, and copies between the two of memory that is not pinned, or has gaps.
        devices: The devices of all tensors.
        peak: The most bytes of CUDA memory at once, of tensors that were made in here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.devices: set[torch.device] = set()
        self.live = self.peak = 0
        self._held: set[int] = set()
        self._pinned = weakref.WeakSet[Any]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if name == "is_pinned":
            return given[0].untyped_storage() in self._pinned
        result = func(*args, **kwargs)
        if name == "_pin_memory":
            self._pinned.add(result.untyped_storage())
        made = [a for a in tree_leaves(result) if isinstance(a, Tensor)]
        here = [a for a in (*given, *made) if a.device.type == "cuda"]
        self.devices |= {a.device for a in (*given, *made)}
        for a in made:
            self._hold(a)
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if here and not views and name not in ALLOCATING:
            self.kernel(name, *here)
            crosses = name in COPYING and any(a.device.type == "cpu" for a in (*given, *made))
            waits = not (kwargs.get("non_blocking") and self._is_pinned(given, made))
            mask = name.startswith("index") and any(a.dtype == torch.bool for a in given[1:])
            if name in WAITING or mask or (crosses and waits):
                self.waits[name] += 1
        return result

    def kernel(self, name: str, *tensors: Tensor) -> None:
        """Count a kernel that reads or writes these tensors."""
        self.launches[name] += 1
        self.bytes[name] += sum(map(_span, tensors))

    def _is_pinned(self, given: list[Tensor], made: list[Tensor]) -> bool:
        host = [a for a in (*given, *made) if a.device.type == "cpu"]
        return all(a.untyped_storage() in self._pinned and a.is_contiguous() for a in host)

    def _hold(self, a: Tensor) -> None:
        """Count the memory of a new tensor until it is freed."""
        storage = a.untyped_storage()
        key = storage._cdata
        if a.device.type != "cuda" or key in self._held:
            return
        self._held.add(key)
        nbytes = 0 if isinstance(storage.nbytes(), torch.SymInt) else storage.nbytes()
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, nbytes)

    def _free(self, key: int, nbytes: int) -> None:
        self._held.discard(key)
        self.live -= nbytes


def _span(a: Tensor) -> int:
    """Bytes of the memory of a tensor; what is expanded is read once. 0 if nobody knows."""
    if any(isinstance(n, torch.SymInt) for n in a.shape):
        return 0
    steps = zip(a.shape, a.stride(), strict=True)
    return a.element_size() * int(np.prod([n for n, step in steps if step]))


class _FakeDevice(FakeTensorMode):
    """Makes on a device what would be made on "meta"."""

    def __init__(self, device: str) -> None:
        # Shapes that depend on values are symbols, of which nothing is known.
        super().__init__(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        self.device = torch.device(device)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and kwargs.get("device") == torch.device("meta"):
            kwargs = {**kwargs, "device": self.device}
        name = func.overloadpacket.__name__
        if name.startswith("_fused_"):  # optimizers; PyTorch has no rule for them
            return None
        if name == "_pin_memory":  # PyTorch refuses without a GPU
            func, kwargs = torch.ops.aten.empty_strided.default, {"dtype": args[0].dtype}
            args = args[0].shape, args[0].stride()  # which it keeps
        return super().dispatch(func, types, args, kwargs)


class _Autocast:
    """Autocast of the network's operations; PyTorch's own does not see fake tensors."""

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}
        self._conv2d, self._group_norm = F.conv2d, F.group_norm

    def conv2d(self, *args: Any) -> Tensor:
        """In the type of autocast where it is enabled."""
        if torch.is_autocast_enabled("cuda"):
            args = tuple(self._cast(a, torch.get_autocast_dtype("cuda")) for a in args)
        return self._conv2d(*args)

    def group_norm(self, x: Tensor, *args: Any) -> Tensor:
        """In float32 where autocast is enabled."""
        return self._group_norm(x.float() if torch.is_autocast_enabled("cuda") else x, *args)

    def _cast(self, a: Any, dtype: torch.dtype) -> Any:
        if not isinstance(a, Tensor) or a.dtype == dtype:
            return a
        if not isinstance(a, nn.Parameter):
            return a.to(dtype)
        if id(a) not in self.weights:
            self.weights[id(a)] = a.to(dtype)
        return self.weights[id(a)]


@contextlib.contextmanager
def fake_cuda(device: str = "cuda:0") -> Iterator[None]:
    """Tensors on "cuda" can be made and differentiated, without a GPU or CUDA; none has values."""
    if torch.cuda.is_available():
        raise RuntimeError("fake_cuda: expected a machine without a GPU; PyTorch sees one")
    make, autocast = torch.Tensor._make_subclass, _Autocast()

    def make_on_meta(*args: Any, **options: Any) -> Any:
        return make(*args, **{**options, "dispatch_device": False})

    with (
        mock.patch.object(torch.Tensor, "_make_subclass", make_on_meta),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *_: True),
        mock.patch("torch.nn.functional.conv2d", autocast.conv2d),
        mock.patch("torch.nn.functional.group_norm", autocast.group_norm),
        mock.patch("torch.clear_autocast_cache", autocast.weights.clear),
        # This asks for plain tensors, of which lists are taken at once.
        mock.patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True),
        _FakeDevice(device),
    ):
        yield


class Kernels:
    """Stands for the kernels of Triton, which do not run on fake tensors."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def value(self, formula: Any, x: Tensor, t: Tensor, out: Tensor) -> Tensor:
        """FL of each logit."""
        self.traffic.kernel("triton value", x, t, out)
        return out

    def total(self, formula: Any, x: Tensor, t: Tensor) -> Tensor:
        """The sum; that of the partial sums is a second kernel."""
        partial = x.new_empty(-(-x.numel() // 2048), dtype=torch.float32)
        self.traffic.kernel("triton sum", x, t, partial)
        return partial.sum()

    def slope(self, formula: Any, x: Tensor, t: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        """dFL/dx."""
        self.traffic.kernel("triton slope", x, t, scale, out)
        return out

    def match(self, anchors: Tensor, boxes: Tensor, *thresholds: float | None) -> Tensor:
        """The box of each anchor; low-quality matches need the greatest IoU of each box first."""
        if thresholds[-1] is not None:
            blocks = -(-len(anchors) // 1024)
            tops = anchors.new_empty((*boxes.shape[:-2], blocks, boxes.shape[-2]))
            self.traffic.kernel("triton top", anchors, boxes, tops)
            tops.amax(dim=-2)
        found = anchors.new_empty((*boxes.shape[:-2], len(anchors)), dtype=torch.int64)
        self.traffic.kernel("triton match", anchors, boxes, found)
        return found

    def suppress(self, boxes: Tensor, classes: Tensor | None, threshold: float) -> Tensor:
        """Which boxes stay, from a bit for each pair of them."""
        count = boxes.shape[-2]
        hits = boxes.new_empty((*boxes.shape[:-1], -(-count // 32)), dtype=torch.int32)
        self.traffic.kernel("triton hits", boxes, hits)
        keep = boxes.new_empty(boxes.shape[:-1], dtype=torch.bool)
        self.traffic.kernel("triton sweep", hits, keep)
        return keep


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """What runs in here, on a GPU with Triton."""
    traffic = Traffic()
    kernels = Kernels(traffic)
    with (
        mock.patch.object(_pointwise, "_kernels", lambda *_: kernels),
        mock.patch.object(_namespace, "box_kernels", lambda *_: kernels),
        traffic,
    ):
        yield traffic


def on_fake_device(module: nn.Module, device: str) -> nn.Module:
    """The module with fake parameters and buffers on a device, in the layout they had."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(_fake(p, device), p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = _fake(b, device)
    return module


def _fake(a: Tensor, device: str) -> Tensor:
    return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=device)


def trainer_on(device: str, config: RetinaNetConfig, train: TrainConfig) -> Trainer:
    """A trainer on a fake device; call it in `fake_cuda`."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        model = build_network(config, 0).to(memory_format=torch.channels_last)
    return Trainer(on_fake_device(model, device), train)


def example_batch(train: TrainConfig, size: tuple[int, int], boxes: int) -> Batch:
    """Images with so many boxes each, of no particular values."""
    count = train.batch_size
    corners = np.random.default_rng(0).uniform(0, min(size) / 2, (count, boxes, 2))
    return Batch(
        np.zeros((count, *size, 3), np.uint8),
        np.concatenate([corners, corners + 20], -1).astype(np.float32),
        np.zeros((count, boxes), np.int64),
        np.array([size] * count),
        np.ones(count),
        np.arange(count),
        np.array([size] * count),
    )


def summary(traffic: Traffic) -> dict[str, Any]:
    """What was counted, in all."""
    return {
        "launches": traffic.launches.total(),
        "gigabytes": round(traffic.bytes.total() / 1e9, 1),
        "waits": traffic.waits.total(),
        "peak_gib": round(traffic.peak / 2**30, 1),
    }


def step(config: RetinaNetConfig, train: TrainConfig) -> dict[str, Any]:
    """Count a training step."""
    with fake_cuda():
        trainer = trainer_on("cuda:0", config, train)
        batch = example_batch(train, config.image_size, BOXES)
        trainer.step(0, batch, 0.01)  # makes the momentum
        with counted() as traffic:
            trainer.step(1, batch, 0.01)
    return {
        **summary(traffic),
        "waits_by_name": dict(traffic.waits.most_common()),
        "launches_by_name": dict(traffic.launches.most_common()),
        "gigabytes_by_name": {k: round(v / 1e9, 2) for k, v in traffic.bytes.most_common(20)},
    }


def parts(config: RetinaNetConfig, images: int) -> dict[str, Any]:
    """Count target assignment and post-processing alone."""
    with fake_cuda(), torch.inference_mode():
        zeros = functools.partial(torch.zeros, device="cuda:0")
        anchors = focal.torch.anchors(config.image_size, config.anchors).to("cuda:0")
        boxes, labels = zeros(images, BOXES, 4), zeros(images, BOXES, dtype=torch.int64)
        outputs = [zeros(images, len(anchors), n) for n in (config.num_classes, 4)]
        sizes = zeros(images, 2, dtype=torch.int64)
        with counted() as assignment:
            focal.torch.assign_targets(anchors, boxes, labels)
        with counted() as processing:
            detections(focal.torch, *outputs, anchors, sizes, config)
    return {"assign_targets": summary(assignment), "post-processing": summary(processing)}


def main() -> None:
    """Count for `r50` with 16 images of 1024 x 1024."""
    preset = PRESETS["r50"]
    config = preset.detector.replace(classes=tuple(map(str, range(80))))
    train = preset.train.replace(precision="bfloat16")
    norms = {
        norm: step(config.replace(norm=norm, head_norm=head_norm), train)
        for norm, head_norm in (("frozen_batch", "none"), ("batch", "none"), ("group", "group"))
    }
    images = train.batch_size
    setting = f"r50, {images} x {config.image_size}, {BOXES} boxes, 80 classes; steps in bfloat16"
    found = parts(config, images)
    record("traffic", "python -m benchmarks.traffic", setting=setting, norms=norms, parts=found)
    rows = [("", "launches", "GB", "waits", "peak GiB")]
    for name, x in (norms | found).items():
        rows.append((name, *(str(x[k]) for k in ("launches", "gigabytes", "waits", "peak_gib"))))
    print(table(rows))


if __name__ == "__main__":
    main()
