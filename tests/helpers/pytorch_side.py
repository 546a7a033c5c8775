"""What PyTorch finds, for the tests that compare another framework with it.

The fixture `pytorch` runs these functions in a process of their own: PyTorch's compiler (Triton)
and TensorFlow bring an LLVM each, and with some releases a process that loads both is aborted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from focal.retinanet.architecture import Backbone
from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.data.loader import Batch

Arrays = dict[str, np.ndarray]


def start() -> None:
    """One thread, as the fixture `one_thread`."""
    import torch

    torch.set_num_threads(1)


def initial(config: RetinaNetConfig, seed: int) -> Arrays:
    """The weights of a new network."""
    from focal.retinanet.torch import network as network_torch

    return network_torch.state(network_torch.build_network(config, seed))


def shapes(config: RetinaNetConfig) -> tuple[dict[str, tuple[int, ...]], int]:
    """The shapes of all weights by name, and the number of parameters."""
    import torch

    from focal.retinanet.torch import network as network_torch

    with torch.device("meta"):
        network = network_torch.RetinaNet(config)
    named = network.state_dict().items()
    found = {name: tuple(x.shape) for name, x in named if "num_batches" not in name}
    return found, sum(x.numel() for x in network.parameters())


def raw_outputs(
    config: RetinaNetConfig, weights: Arrays, images: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Class logits and deltas."""
    from focal.retinanet.torch import trainer as backend_torch

    return backend_torch.raw_outputs(_detector(config, weights), images)


def detect(
    config: RetinaNetConfig, weights: Arrays, images: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, scores and labels."""
    from focal.retinanet.torch import trainer as backend_torch

    return backend_torch.detect(_detector(config, weights), images, sizes)


def step(
    config: RetinaNetConfig,
    run: TrainConfig,
    weights: Arrays,
    number: int,
    batch: Batch,
    rate: float,
) -> tuple[dict[str, float], Arrays, Arrays]:
    """What a step of training reports, the trainer's state after it, and the weights to keep."""
    import torch

    from focal.retinanet.torch import trainer as backend_torch

    trainer = backend_torch.Trainer(_detector(config, weights), run)
    parts = {name: float(x) for name, x in trainer.step(number, batch, rate).items()}
    if run.clip_norm is None:  # in float64: over millions of weights, float32 loses 2e-5
        gradients = [p.grad.double() for p in trainer.parameters]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        assert parts["gradient_norm"] == pytest.approx(norm, rel=1e-4)
        parts["gradient_norm"] = norm
    return parts, trainer.state(), trainer.weights()


def bottleneck(
    net: Backbone,
    norm: str,
    sizes: tuple[int, int, int],
    x: np.ndarray,
    weights: Mapping[str, np.ndarray] | None = None,
) -> tuple[Arrays, np.ndarray, Arrays]:
    """Weights, output (N, H, W, C) and gradient of the output's squares of one block.

    `sizes` are its inputs, width and stride; without `weights` they are new ones.
    """
    import torch

    from focal.retinanet.torch import network as network_torch

    torch.manual_seed(0)
    block = network_torch.Bottleneck(*sizes, net, network_torch._NORMS[norm])
    if weights is not None:
        block.load_state_dict({name: torch.tensor(x) for name, x in weights.items()})
    y = block(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    y.square().sum().backward()
    return (
        {name: x.detach().numpy() for name, x in block.state_dict().items()},
        y.detach().numpy(),
        {name: x.grad.numpy() for name, x in block.named_parameters()},
    )


def optimize(
    run: TrainConfig,
    start: Sequence[np.ndarray],
    gradients: Sequence[Sequence[np.ndarray]],
    rates: Sequence[float],
) -> list[list[np.ndarray]]:
    """The parameters after each step of PyTorch's own optimizer."""
    import torch

    parameters = [torch.nn.Parameter(torch.tensor(x)) for x in start]
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[run.optimizer]
    options = {"momentum": run.momentum} if run.optimizer == "sgd" else {}
    optimizer = kind(parameters, lr=1.0, weight_decay=run.weight_decay, **options)
    found = []
    for of_a_step, rate in zip(gradients, rates, strict=True):
        for parameter, gradient in zip(parameters, of_a_step, strict=True):
            parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        if run.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, run.clip_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        found.append([x.detach().numpy().copy() for x in parameters])
    return found


def saved(config: RetinaNetConfig, weights: Arrays, path: Path) -> None:
    """Write a weights file."""
    from focal.retinanet import save

    save(_detector(config, weights), path)


def loaded(path: Path) -> tuple[RetinaNetConfig, Arrays]:
    """Read a weights file into a detector: its config and weights."""
    from focal.retinanet import load
    from focal.retinanet.torch import trainer as backend_torch

    model = load(path, "torch", "cpu")
    return model.config, backend_torch.state(model)


def _detector(config: RetinaNetConfig, weights: Arrays) -> Any:
    from focal.retinanet.torch import trainer as backend_torch

    model = backend_torch.build(config, 0, "cpu")
    backend_torch.load_state(model, weights)
    return model
