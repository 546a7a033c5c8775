"""The parts of a training step in PyTorch: how much of it is not the network."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import summary
from focal.retinanet import backend_torch
from focal.retinanet.data import train_batches
from focal.retinanet.data.shapes import ShapesDataset
from focal.retinanet.presets import PRESETS


class SplitTrainer(backend_torch.Trainer):
    """A trainer whose network and optimiser note when they run."""

    def watch(self) -> dict[str, float]:
        """Start measuring; the seconds of network forward and optimiser add up in the result.

        The network's backward runs from the moment the gradient reaches its outputs to the end
        of `backward`, which is where clipping, the optimiser's first part, begins.
        """
        spent = dict.fromkeys(("forward", "backward", "optimiser"), 0.0)
        marks: dict[str, float] = {}

        def now(name: str) -> None:
            marks[name] = time.perf_counter()

        def reached(grad: Tensor) -> None:
            now("backward")  # of the last output to be reached

        def after_forward(_module: Any, _args: Any, outputs: tuple[Tensor, ...]) -> None:
            spent["forward"] += time.perf_counter() - marks["forward"]
            for output in outputs:
                output.register_hook(reached)

        self.model.register_forward_pre_hook(lambda *_: now("forward"))
        self.model.register_forward_hook(after_forward)
        clip, update = torch.nn.utils.clip_grad_norm_, self._update_average

        def clip_grad_norm_(*args: Any, **kwargs: Any) -> Tensor:
            now("optimiser")
            spent["backward"] += marks["optimiser"] - marks["backward"]
            return clip(*args, **kwargs)

        def update_average(number: int) -> None:
            update(number)
            spent["optimiser"] += time.perf_counter() - marks["optimiser"]

        torch.nn.utils.clip_grad_norm_ = clip_grad_norm_
        self._update_average = update_average  # type: ignore[method-assign]
        return spent


def training_step(repetitions: int = 30, warm_up: int = 12) -> dict[str, Any]:
    """Median milliseconds of the parts of a step of the preset `tiny`, 240x240, batch of 8."""
    preset = PRESETS["tiny"]
    assert preset.train.crop == (240, 240) and preset.train.batch_size == 8
    # As many objects an image as the blood cells have, few enough images that the loader keeps
    # them all decoded after the warm-up, as it does in a run of several epochs.
    dataset = ShapesDataset("train", size=preset.detector.canvas, num_images=32, num_objects=14)
    model = backend_torch.build(preset.detector.replace(classes=dataset.classes), 0, "cpu")
    trainer = SplitTrainer(model, preset.train)
    batches = train_batches(dataset, model.config, preset.train)
    clip = torch.nn.utils.clip_grad_norm_
    steps: list[dict[str, float]] = []
    try:
        spent = trainer.watch()
        for number in range(warm_up + repetitions):
            spent.update(dict.fromkeys(spent, 0.0))
            start = time.perf_counter()
            trainer.step(number, next(batches), 1e-4)
            whole = time.perf_counter() - start
            steps.append({**spent, "the rest": whole - sum(spent.values()), "step": whole})
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
        batches.close()  # type: ignore[attr-defined]
    parts = {name: [step[name] * 1e3 for step in steps[warm_up:]] for name in steps[0]}
    shares = [step["the rest"] / step["step"] for step in steps[warm_up:]]
    return {
        **{name: summary(values) for name, values in parts.items()},
        "share_of_the_rest": round(statistics.median(shares), 3),
        "precision": trainer.precision,
    }
