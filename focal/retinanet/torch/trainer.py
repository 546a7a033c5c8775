"""Training and inference in PyTorch, from NumPy batches."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import focal.torch as F
from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.data.loader import Batch
from focal.retinanet.objective import EMA_START, Targets, losses, normalizer, targets
from focal.retinanet.postprocess import Detections, detections
from focal.retinanet.replicas import Replicas
from focal.retinanet.torch.network import (
    BatchNorm,
    RetinaNet,
    build_network,
    freeze,
    load_state,
    recompute,
    state,
)
from focal.retinanet.weights import part

__all__ = [
    "Trainer",
    "build",
    "describe",
    "detect",
    "detections_of",
    "load_state",
    "raw_outputs",
    "replicas",
    "state",
]

PATIENCE = timedelta(hours=2)
"""Timeout of collective operations: all processes wait while rank 0 evaluates."""


def replicas(device: str | None = None) -> Replicas:
    """The processes of torchrun, or of a launcher that sets its variables: one for each device.

    `torch.distributed` is initialized where it is not yet.
    """
    if not distributed.is_available():
        return Replicas()
    if not distributed.is_initialized():
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
            return Replicas()
        name = None if device is None else _name(device)
        if name not in (None, "cpu", "cuda"):
            raise ValueError(
                f"device {device!r} cannot be used by several processes: "
                "expected cpu or cuda, of which each process takes its own"
            )
        place = None
        if name != "cpu" and torch.cuda.is_available():
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(place)  # what "cuda" means from now on
        distributed.init_process_group(
            "nccl" if place else "gloo", timeout=PATIENCE, device_id=place
        )
        atexit.register(distributed.destroy_process_group)
    rank, count = distributed.get_rank(), distributed.get_world_size()

    def maximum(value: int) -> int:
        place = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        found = torch.tensor(value, device=place)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        if distributed.get_backend() == "gloo":
            # gloo's thread releases `found` later. If that is when the interpreter ends, the
            # process is aborted; the barrier makes it happen now.
            distributed.monitored_barrier(timeout=PATIENCE)
        return int(found)

    return Replicas(rank, count, maximum=maximum)


def build(config: RetinaNetConfig, seed: int, device: str | None = None) -> RetinaNet:
    """A network in evaluation mode, on the GPU where there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=_name(device))
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used: {reason}") from error
    network = build_network(config, seed).to(_name(device))
    return network.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def _name(device: str) -> str:
    """PyTorch's name of a device: GPUs may be called "gpu" in every framework."""
    return re.sub("^gpu", "cuda", device.lower())


def describe(model: RetinaNet) -> dict[str, Any]:
    """Device and versions, for the records of a run."""
    device = _device(model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type} ({name}, {torch.get_num_threads()} threads)",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "parameters": sum(p.numel() for p in model.parameters()),
    }


@contextlib.contextmanager
def _evaluating(model: RetinaNet) -> Iterator[None]:
    """Fixed statistics and no gradients, whatever mode the model is in."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), _convolutions(_device(model)):
            yield
    finally:
        model.train(training)


def raw_outputs(model: RetinaNet, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class logits (B, N, K) and deltas (B, N, 4) of uint8 canvases (B, H, W, 3)."""
    with _evaluating(model):
        logits, deltas = model(_normalized(model, images))
    return logits.float().cpu().numpy(), deltas.float().cpu().numpy()


def detect(
    model: RetinaNet, images: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (B, D, 4) on the canvas, scores (B, D) and labels (B, D) of uint8 canvases."""
    with _evaluating(model):
        found = detections_of(model, images, _moved(sizes, _device(model)))
    return tuple(part.cpu().numpy() for part in found)


def detections_of(model: RetinaNet, images: np.ndarray | Tensor, sizes: Tensor) -> Detections:
    """`detect` in PyTorch operations alone, for `torch.compile` and exports."""
    height, width = images.shape[1:3]
    anchors = model.anchors((height, width))
    logits, deltas = model(_normalized(model, images))
    return detections(F, logits, deltas, anchors, sizes, model.config)


class Trainer:
    """One training run: the network, its optimizer, and the moving average of its weights.

    With several processes, `replicas` must be that of `replicas()`: positives are counted over all
    processes of `torch.distributed`.
    """

    def __init__(
        self, model: RetinaNet, train: TrainConfig, replicas: Replicas | None = None
    ) -> None:
        if train.recompute and train.compile and model.config.norm == "batch":
            raise ValueError(
                "TrainConfig: torch.compile would count each batch twice in the running "
                "statistics; compile with recompute needs norm 'group' or 'frozen_batch', "
                "got 'batch'"
            )
        self.model = model.train()
        freeze(model, train.freeze)
        self.train = train
        self.replicas = replicas or Replicas()
        self.device = _device(model)
        self.precision: str = train.precision
        if train.precision == "auto":
            self.precision = _fast_precision(self.device)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(self.parameters, train)
        # On the device, it skips the step of a gradient that is not finite. It scales nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=1.0)
        self.average = {k: v.clone() for k, v in self._floats().items()} if train.ema else {}
        self.mean_positives = torch.tensor(EMA_START, device=self.device)
        # False from the first loss or gradient that is not finite; then no step changes anything.
        self.healthy = torch.tensor(True, device=self.device)
        if train.recompute:
            recompute(model)
        self.network: Callable[[Tensor], tuple[Tensor, Tensor]] = model
        if self.replicas.count > 1:
            if self.device.type == "cuda":  # on a CPU there is none: each has its own statistics
                nn.SyncBatchNorm.convert_sync_batchnorm(model)
            self.network = DistributedDataParallel(model, gradient_as_bucket_view=True)
        # A skipped step must leave them unchanged. The counters of batches are not used.
        self.statistics = [
            x
            for m in model.modules()
            if isinstance(m, BatchNorm)
            for x in m.buffers()
            if x.is_floating_point()
        ]
        self.before = [x.clone() for x in self.statistics]
        self.no_sync = getattr(self.network, "no_sync", contextlib.nullcontext)
        if train.compile:
            self.network = torch.compile(self.network)

    def step(self, number: int, batch: Batch, learning_rate: float) -> dict[str, Tensor]:
        """One step of the optimizer; the losses stay on the device.

        `batch` is this process's share; the losses are those of the whole batch.
        """
        with _convolutions(self.device):
            return self._step(number, batch, learning_rate)

    def _step(self, number: int, batch: Batch, learning_rate: float) -> dict[str, Tensor]:
        model, config = self.model, self.model.config
        if self.statistics:
            torch._foreach_copy_(self.before, self.statistics)
        height, width = batch.images.shape[1:3]
        anchors = model.anchors((height, width))
        with torch.no_grad():
            target = targets(F, anchors, *self._boxes(batch), config)
            positives = F.num_positives(target.labels)
            images = len(batch.images) * self.replicas.count
            divisor, mean_positives = normalizer(config, images, positives, self.mean_positives)

        self.optimizer.zero_grad(set_to_none=True)
        classification, box = self._backward(batch.images, anchors, target, divisor)
        loss = classification + box
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.train.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.train.clip_norm, norm)

        self.healthy = self.healthy & loss.isfinite() & norm.isfinite()
        gradients[0].add_(torch.where(self.healthy, 0.0, math.nan))  # what the scaler looks for
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update(1.0)
        for x, old in zip(self.statistics, self.before, strict=True):
            torch.where(self.healthy, x, old, out=x)
        self.mean_positives = torch.where(self.healthy, mean_positives, self.mean_positives)
        if self.train.ema:
            self._move_average(self.train.average_decay(number))
        return {
            "loss": loss,
            "classification": classification,
            "box": box,
            "positives": positives,
            "gradient_norm": norm,
        }

    def _backward(
        self, images: np.ndarray, anchors: Tensor, target: Targets, divisor: Tensor | int
    ) -> Tensor:
        """Forward and backward pass of each gradient-accumulation step; both losses."""
        found = torch.zeros(2, device=self.device)
        rows = len(images) // self.train.accumulate
        for first in range(0, len(images), rows):
            piece = slice(first, first + rows)
            last = first + rows == len(images)
            with contextlib.nullcontext() if last else self.no_sync():
                with _autocast(self.device, self.precision):
                    inputs = _normalized(self.model, images[piece], self.precision)
                    logits, deltas = self.network(inputs)
                part = Targets(target.labels[piece], target.deltas[piece])
                loss = losses(F, logits, deltas, anchors, part, self.model.config, divisor)
                # Normalized by the positives of all replicas, the gradients are to be added up;
                # DistributedDataParallel takes their mean.
                total = (loss.classification + loss.box) * self.replicas.count
                self.scaler.scale(total).backward()
            found += torch.stack(loss).detach()
        if self.replicas.count > 1:
            distributed.all_reduce(found)
        return found

    def _boxes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Boxes and labels, without the padding that no image of this batch needs."""
        most = max(1, int((batch.labels >= 0).sum(1).max()))
        boxes, labels = (x[:, :most] for x in (batch.boxes, batch.labels))
        return _moved(boxes, self.device), _moved(labels, self.device)

    def weights(self) -> dict[str, np.ndarray]:
        """The weights to evaluate and to keep: the moving average where there is one."""
        own = state(self.model)
        return own | {k: v.cpu().numpy().copy() for k, v in self.average.items()}

    def state(self) -> dict[str, np.ndarray]:
        """All state of the run, by name."""
        tensors = {f"model/{k}": v for k, v in state(self.model).items()}
        tensors |= {f"average/{k}": v.cpu().numpy().copy() for k, v in self.average.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            for key, value in values.items():
                if value is not None:
                    tensors[f"optimizer/{index}/{key}"] = value.cpu().numpy().copy()
        tensors["mean_positives"] = self.mean_positives.cpu().numpy().copy()
        return tensors

    def load_state(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Continue from the result of `state`."""
        load_state(self.model, part(tensors, "model/"))
        for key, value in part(tensors, "average/").items():
            self.average[key].copy_(torch.as_tensor(value))
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in part(tensors, "optimizer/").items():
            index, key = name.split("/", 1)
            tensor, parameter = torch.tensor(value), self.parameters[int(index)]
            if tensor.shape == parameter.shape:
                # Fused optimizers take it as it lies in memory: it must lie as the parameter does.
                tensor = torch.empty_like(parameter).copy_(tensor)
            slots.setdefault(int(index), {})[key] = tensor
        full = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**full, "state": slots})
        self.mean_positives.copy_(torch.as_tensor(tensors["mean_positives"]))

    def _floats(self) -> dict[str, Tensor]:
        """Weights and statistics, without counters."""
        return {k: v for k, v in self.model.state_dict().items() if v.is_floating_point()}

    @torch.no_grad()
    def _move_average(self, decay: float) -> None:
        """The exponential moving average of weights and statistics; it stays where not healthy."""
        current = self._floats()
        averages = list(self.average.values())
        # All tensors in a few kernels; `swa_utils.AveragedModel` would wait for the device.
        change = torch._foreach_sub([current[name] for name in self.average], averages)
        torch._foreach_mul_(change, (1 - decay) * self.healthy)
        torch._foreach_add_(averages, change)


def _optimizer(parameters: list[nn.Parameter], train: TrainConfig) -> torch.optim.Optimizer:
    rate, decay = train.learning_rate, train.weight_decay
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, rate, weight_decay=decay, fused=True)
    return torch.optim.SGD(parameters, rate, train.momentum, weight_decay=decay, fused=True)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _moved(x: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device; from pinned memory, the host does not wait for it."""
    tensor = torch.as_tensor(x)
    if device.type != "cuda":
        return tensor.to(device)
    # With gaps it would be copied by way of memory that is not pinned.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def _normalized(
    model: RetinaNet, images: np.ndarray | Tensor, precision: str = "float32"
) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W), channels-last in memory as it came."""
    if not isinstance(images, Tensor):
        images = _moved(images, _device(model))
    batch, height, width, channels = images.shape
    # Rows of width x 3 values: an innermost axis of 3 is too short to vectorize over.
    rows = images.view(batch, height, width * channels)
    shift, scale = model.shift.repeat(width), model.scale.repeat(width)
    if precision == "float32" or rows.device.type != "cpu":
        normalized = torch.addcmul(shift, rows.float(), scale)
    else:  # what autocast would make of it, image by image in the cache
        normalized = torch.empty_like(rows, dtype=getattr(torch, precision))
        for out, row in zip(normalized, rows, strict=True):
            out.copy_(torch.addcmul(shift, row.float(), scale))
    return normalized.view(images.shape).permute(0, 3, 1, 2)


@contextlib.contextmanager
def _convolutions(device: torch.device) -> Iterator[None]:
    """Convolutions of cuDNN in full float32, not TF32, by the fastest algorithm for each shape.

    The shapes are few: canvases have one size. Both are settings of the process, so they are
    restored.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    setting: tuple[Any, str, Any] = cudnn, "allow_tf32", False
    if hasattr(cudnn, "conv"):  # since PyTorch 2.9, where convolutions have a setting of their own
        setting = cudnn.conv, "fp32_precision", "ieee"
    owner, name, exact = setting
    before, benchmark = getattr(owner, name), cudnn.benchmark
    try:
        setattr(owner, name, exact)
        cudnn.benchmark = True
        yield
    finally:
        setattr(owner, name, before)
        cudnn.benchmark = benchmark


def _fast_precision(device: torch.device) -> str:
    """bfloat16 where the hardware multiplies it faster, else float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32"
    # Older versions do not have `get_capabilities`.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    # Measured on a Xeon without AMX: a step in bfloat16 takes 1.2 times as long (docs/pytorch.md).
    intel = "Intel" in capabilities.get("cpu_name", "")
    native = capabilities.get("amx_bf16" if intel else "avx512_bf16")
    return "bfloat16" if native else "float32"


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
