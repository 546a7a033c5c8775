"""The command `focal` with the varifocal loss in place of the focal loss, in PyTorch.

    python -m benchmarks.varifocal train --data path/to/bccd --out runs/varifocal

The target of a positive is the IoU of its predicted box with its object (arXiv:2008.13367), so that
scores rank boxes by how well they fit.
"""

from __future__ import annotations

import argparse
from types import ModuleType

import torch
from torch import Tensor

import focal.torch as F
from focal.cli import main
from focal.retinanet import RetinaNetConfig
from focal.retinanet.objective import Losses, Targets, losses
from focal.retinanet.torch import trainer


def varifocal_losses(
    module: ModuleType,
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    target: Targets,
    config: RetinaNetConfig,
    divisor: Tensor | float,
) -> Losses:
    """As `focal.retinanet.objective.losses`, with the other classification loss."""
    box = losses(module, logits, deltas, anchors, target, config, divisor).box
    quality = qualities(logits, deltas.detach().float(), anchors, target)
    used = (target.labels >= -1)[..., None]
    loss = F.varifocal_loss(logits.float(), quality, 0.75, 2.0, "sum", weight=used)
    return Losses(loss / divisor, box)


def qualities(logits: Tensor, deltas: Tensor, anchors: Tensor, target: Targets) -> Tensor:
    """Targets (B, N, K): the IoU of the box where an anchor has an object, else 0."""
    quality = torch.zeros_like(logits, dtype=torch.float32)
    image, anchor = torch.nonzero(target.labels >= 0, as_tuple=True)
    found, wanted = (
        F.decode_boxes(rows[image, anchor], anchors[anchor])[:, None]
        for rows in (deltas, target.deltas)
    )
    # Exactly 0 would be a negative.
    iou = F.box_iou(found, wanted)[:, 0, 0].clamp(min=1e-3)
    quality[image, anchor, target.labels[image, anchor]] = iou
    return quality


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--backend", choices=["torch"])
    parser.parse_known_args()  # an error for other frameworks, which keep their loss
    trainer.losses = varifocal_losses
    raise SystemExit(main())
