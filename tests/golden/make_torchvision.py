"""What torchvision's RetinaNets detect with seeded weights, on seeded images.

    python tests/golden/make_torchvision.py

writes `torchvision_detections.json` beside this script, where torchvision can be imported. Nothing
of focal is imported. `weights` and `image` make the same arrays anywhere, from names, shapes and
NumPy's generator, so that a test can give them to focal without torchvision.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).with_name("torchvision_detections.json")
SIZES = [(512, 640), (480, 640), (800, 1088)]
VERSIONS = ["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"]
CLASSES = 3

# By the end of a name: what a layer multiplies the standard deviation with. The coarse levels are
# raised so that the best scores come from all of them.
GAINS = {
    "bn3.weight": 0.25,
    "inner_blocks.0.0.weight": 0.1,
    "inner_blocks.1.0.weight": 0.1,
    "inner_blocks.2.0.weight": 0.1,
    "p6.weight": 2.0,
    "p7.weight": 2.0,
    "cls_logits.weight": 1.0,
    "bbox_reg.weight": 0.3,
}
SCORES = -4.5  # the bias of the logits


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Seeded weights of a network, by name: activations neither vanish nor grow."""
    return {name: _tensor(name, shape) for name, shape in shapes.items()}


def _tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    gain = next((gain for end, gain in GAINS.items() if name.endswith(end)), 1.0)
    if len(shape) == 4:
        relu = "body" in name or "head" in name
        x = rng.standard_normal(shape) * gain * ((1 + relu) / np.prod(shape[1:])) ** 0.5
    elif name.endswith((".weight", ".running_var")):
        x = rng.uniform(0.7, 1.4, shape) * gain
    else:
        x = rng.standard_normal(shape) * 0.1 + SCORES * name.endswith("cls_logits.bias")
    return x.astype(np.float32)


def image(size: tuple[int, int]) -> np.ndarray:
    """An HWC uint8 image of squares of random colors."""
    height, width = size
    squares = np.random.default_rng(size).integers(0, 256, (height // 16, width // 16, 3))
    return squares.repeat(16, axis=0).repeat(16, axis=1).astype(np.uint8)


def detections(version: str, size: tuple[int, int]) -> dict[str, Any]:
    """Boxes, scores and labels, best first."""
    import torch
    from torchvision.models import detection

    network = getattr(detection, version)(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES,
        min_size=min(size),
        max_size=max(size),
    ).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and not version.endswith("v2"):
            module.eps = 1e-30  # it is 0 in the published weights of this version
    shapes = {k: tuple(x.shape) for k, x in network.state_dict().items() if x.is_floating_point()}
    tensors = {name: torch.from_numpy(x) for name, x in weights(shapes).items()}
    network.load_state_dict(tensors, strict=False)  # but for the counters of batches
    x = torch.from_numpy(image(size)).permute(2, 0, 1) / 255
    with torch.inference_mode():
        (found,) = network([x])
    return {
        "version": version,
        "image_size": size,
        "boxes": [[round(v, 3) for v in box] for box in found["boxes"].tolist()],
        "scores": [round(v, 6) for v in found["scores"].tolist()],
        "labels": found["labels"].tolist(),
    }


def main() -> None:
    """Write the file."""
    import torchvision

    cases = [detections(version, size) for version in VERSIONS for size in SIZES]
    content = {"torchvision": torchvision.__version__.split("+")[0], "cases": cases}
    PATH.write_text(json.dumps(content, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
