"""The PyTorch side of the detector: everything between NumPy batches and the network."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from focal.core.anchors import anchors as core_anchors
from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.data.loader import Batch
from focal.retinanet.network_torch import RetinaNet, build_network, load_state, state
from focal.retinanet.objective import EMA_START, objective, running_mean, targets
from focal.retinanet.postprocess import detections
from focal.retinanet.weights import part
from focal.torch._namespace import xp

__all__ = ["Trainer", "build", "describe", "detect", "load_state", "raw_outputs", "state"]


def build(config: RetinaNetConfig, seed: int, device: str | None = None) -> RetinaNet:
    """A network in evaluation mode, on the GPU where there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used: {reason}") from error
    network = build_network(config, seed).to(device, memory_format=torch.channels_last)
    return network.eval()


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
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def raw_outputs(model: RetinaNet, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class logits (B, N, K) and deltas (B, N, 4) of uint8 canvases (B, H, W, 3)."""
    with _evaluating(model):
        logits, deltas = model(_normalised(model, images))
    return logits.float().cpu().numpy(), deltas.float().cpu().numpy()


def detect(
    model: RetinaNet, images: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (B, D, 4) on the canvas, scores (B, D) and labels (B, D) of uint8 canvases."""
    device = _device(model)
    anchors = _anchors(images.shape[1:3], model.config, device)
    covered = torch.as_tensor(sizes, device=device)
    with _evaluating(model):
        logits, deltas = model(_normalised(model, images))
        found = detections(xp, logits, deltas, anchors, covered, model.config)
    return tuple(part.cpu().numpy() for part in found)


class Trainer:
    """One training run: the network, its optimiser, and the moving average of its weights."""

    def __init__(self, model: RetinaNet, train: TrainConfig) -> None:
        self.model = model.train()
        self.train = train
        self.device = _device(model)
        self.precision = train.precision
        if train.precision == "auto":
            self.precision = _fast_precision(self.device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.parameters = parameters
        if train.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                parameters,
                train.learning_rate,
                train.momentum,
                weight_decay=train.weight_decay,
                fused=True,
            )
        else:
            self.optimizer = torch.optim.AdamW(
                parameters, train.learning_rate, weight_decay=train.weight_decay, fused=True
            )
        self.average = {k: v.clone() for k, v in self._floats().items()} if train.ema else {}
        self.mean_positives = torch.tensor(EMA_START, device=self.device)
        # False from the first loss or gradient that is not finite; then no step changes anything.
        self.healthy = torch.tensor(True, device=self.device)
        self.anchors: dict[tuple[int, int], Tensor] = {}

    def step(self, number: int, batch: Batch, learning_rate: float) -> dict[str, Tensor]:
        """One step of the optimiser; the loss parts stay on the device."""
        config = self.model.config
        images = _normalised(self.model, batch.images)
        # The padding that no image of this batch needs is left out on the host.
        most = max(1, int((batch.labels >= 0).sum(1).max()))
        boxes = torch.as_tensor(batch.boxes[:, :most], device=self.device)
        labels = torch.as_tensor(batch.labels[:, :most], device=self.device)
        canvas = (images.shape[2], images.shape[3])
        if canvas not in self.anchors:
            self.anchors[canvas] = _anchors(canvas, config, self.device)
        anchors = self.anchors[canvas]

        statistics = [x for x in self.model.buffers() if x.is_floating_point()]
        before = [x.clone() for x in statistics]
        with torch.no_grad():
            target = targets(xp, anchors, boxes, labels, config)
        with _autocast(self.device, self.precision):
            logits, deltas = self.model(images)
        logits, deltas = logits.float(), deltas.float()
        normaliser = None
        mean_positives = self.mean_positives
        if config.normaliser == "ema":
            positives = (target.labels >= 0).sum().float()
            normaliser = mean_positives = running_mean(mean_positives, positives)
        parts = objective(xp, logits, deltas, anchors, target, config, normaliser)
        loss = parts.classification + parts.box

        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.train.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.train.clip_norm, norm)
        self.healthy = self.healthy & loss.detach().isfinite() & norm.isfinite()
        # What `torch.amp.GradScaler` tells a fused optimiser, on the device: do not step.
        self.optimizer.found_inf = (~self.healthy).float()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        for x, old in zip(statistics, before, strict=True):
            x.copy_(torch.where(self.healthy, x, old))
        self.mean_positives = torch.where(self.healthy, mean_positives, self.mean_positives)
        self._update_average(number)
        return {
            "loss": loss.detach(),
            "classification": parts.classification.detach(),
            "box": parts.box.detach(),
            "positives": parts.positives,
            "gradient_norm": norm,
        }

    def weights(self) -> dict[str, np.ndarray]:
        """The weights to evaluate and to keep: the moving average where there is one."""
        own = state(self.model)
        return own | {k: v.cpu().numpy().copy() for k, v in self.average.items()}

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on, by name."""
        tensors = {f"model/{k}": v for k, v in state(self.model).items()}
        tensors |= {f"average/{k}": v.cpu().numpy().copy() for k, v in self.average.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            for key, value in values.items():
                if value is not None:
                    tensors[f"optimizer/{index}/{key}"] = value.cpu().numpy().copy()
        tensors["mean_positives"] = self.mean_positives.cpu().numpy().copy()
        return tensors

    def load_state(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` gave."""
        load_state(self.model, part(tensors, "model/"))
        for key, value in part(tensors, "average/").items():
            self.average[key].copy_(torch.as_tensor(value))
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in part(tensors, "optimizer/").items():
            index, key = name.split("/", 1)
            tensor, parameter = torch.tensor(value), self.parameters[int(index)]
            if tensor.shape == parameter.shape:
                # Fused optimisers take it as it lies in memory: it must lie as the parameter does.
                tensor = torch.empty_like(parameter).copy_(tensor)
            slots.setdefault(int(index), {})[key] = tensor
        full = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**full, "state": slots})
        self.mean_positives.copy_(torch.as_tensor(tensors["mean_positives"]))

    def _floats(self) -> dict[str, Tensor]:
        """Weights and statistics, without counters."""
        return {k: v for k, v in self.model.state_dict().items() if v.is_floating_point()}

    @torch.no_grad()
    def _update_average(self, number: int) -> None:
        if self.train.ema:
            current = self._floats()
            share = (1 - self.train.average_decay(number)) * self.healthy
            averages = list(self.average.values())
            change = torch._foreach_sub([current[k] for k in self.average], averages)
            torch._foreach_mul_(change, share)
            torch._foreach_add_(averages, change)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _normalised(model: RetinaNet, images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) float32, channels-last in memory as it came."""
    device = _device(model)
    batch, height, width, channels = images.shape
    # One long row of pixels times channels: three channels alone are too few to vectorise over.
    mean = torch.tensor(model.config.mean, device=device).repeat(width)
    std = torch.tensor(model.config.std, device=device).repeat(width)
    rows = torch.as_tensor(images, device=device).view(batch, height, width * channels).float()
    normalised = torch.addcmul(-mean / std, rows, 1 / (255 * std))
    return normalised.view(images.shape).permute(0, 3, 1, 2)


def _anchors(canvas: tuple[int, ...], config: RetinaNetConfig, device: torch.device) -> Tensor:
    height, width = canvas
    return core_anchors(xp, (height, width), config.anchors).to(device)


def _fast_precision(device: torch.device) -> str:
    """bfloat16 where the hardware multiplies it, else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"


def _autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
