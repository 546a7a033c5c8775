"""One checkpoint in every framework, on GPU and CPU: raw outputs and boxes in float32."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.losses_jax import on_gpu
from benchmarks.gpu.results import Job, Plan
from benchmarks.gpu.training import dataset
from focal.retinanet import PRESETS, build, load, predict, raw_outputs
from focal.retinanet.detector import backend_module
from focal.retinanet.weights import save_weights

IMAGES = 4
SPREAD = {"cls_logits": 1.5, "bbox_reg": 0.5}
"""Standard deviation of logits and deltas, given to the last layer of each subnet."""
SAME_SCORE, SAME_PIXELS = 1e-3, 0.5

Outputs = tuple[np.ndarray, np.ndarray, list[dict[str, np.ndarray]]]


def plan(job: Job) -> Plan:
    gpu = "cpu" if job.dry else "cuda"
    cases = dict.fromkeys([("torch", gpu), ("jax", gpu), ("jax", "cpu")])
    return {", ".join(case): functools.partial(compare, job, *case) for case in cases}


def compare(job: Job, backend: str, device: str) -> dict[str, Any]:
    """How far a framework on a device is from PyTorch on the CPU."""
    if backend == "jax":
        on_gpu(job)
    return distance(reference(job), outputs(checkpoint(job), images(job), backend, device))


@functools.cache
def images(job: Job) -> Sequence[np.ndarray]:
    """Images of the test split."""
    data = dataset(job.data, ("test", "val"), job.dry)
    return [data[i].image for i in range(min(2 if job.dry else IMAGES, len(data)))]


@functools.cache
def checkpoint(job: Job) -> Path:
    """A weights file of random weights whose outputs are not all alike."""
    config = PRESETS["tiny" if job.dry else "r50"].detector
    size = (64, 64) if job.dry else (512, 512)
    config = config.replace(classes=("a", "b", "c"), image_size=size, norm="batch")
    model = build(config, device="cpu", seed=1)
    library = backend_module("torch")
    state = library.state(model)
    scales = dict(zip(SPREAD, raw_outputs(model, images(job)), strict=True))
    for layer, spread in SPREAD.items():
        (name,) = (k for k in state if k.endswith(f"{layer}.weight"))
        state[name] = state[name] * (spread / scales[layer].std())
    path = job.scratch / "agree.safetensors"
    save_weights(path, state, config)
    return path


@functools.cache
def reference(job: Job) -> Outputs:
    """PyTorch on the CPU."""
    return outputs(checkpoint(job), images(job), "torch", "cpu")


def outputs(path: Path, images: Sequence[np.ndarray], backend: str, device: str) -> Outputs:
    """Logits, deltas and detections."""
    model = load(path, backend, device=device)
    return *raw_outputs(model, images), predict(model, images)


def distance(expected: Outputs, got: Outputs) -> dict[str, Any]:
    """Largest differences, relative to the largest value, and the share of detections matched."""
    found: dict[str, Any] = {}
    for name, a, b in zip(("logits", "deltas"), expected, got, strict=False):
        found[name] = float(np.abs(a - b).max() / np.abs(a).max())
    pairs = [matched(a, b) for a, b in zip(expected[2], got[2], strict=True)]
    count = sum(len(a["scores"]) for a in expected[2])
    boxes = np.concatenate([pair for pair in pairs if len(pair)] or [np.zeros(0)])
    found |= {
        "detections": count,
        "found": sum(len(b["scores"]) for b in got[2]),
        "matched": round(sum(map(len, pairs)) / max(1, count), 4),
        "boxes_px": float(boxes.max(initial=0)),
    }
    return found


def matched(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> np.ndarray:
    """Largest corner distance to the partner of each detection that has one."""
    if not len(a["scores"]) or not len(b["scores"]):
        return np.zeros(0)
    apart = np.abs(a["boxes"][:, None] - b["boxes"]).max(axis=-1)
    same = (a["labels"][:, None] == b["labels"]) & (
        np.abs(a["scores"][:, None] - b["scores"]) <= SAME_SCORE
    )
    nearest = np.where(same, apart, np.inf).min(axis=1)
    return nearest[nearest <= SAME_PIXELS]
