"""The parts of a training step in PyTorch: how much of it is not the network."""

from __future__ import annotations

import statistics
import time
from typing import Any

from torch import Tensor

from benchmarks.common import summary
from focal.retinanet.config import RetinaNetConfig, TrainConfig
from focal.retinanet.data import train_batches
from focal.retinanet.data.shapes import ShapesDataset
from focal.retinanet.presets import PRESETS
from focal.retinanet.torch import trainer as backend_torch


class SplitTrainer(backend_torch.Trainer):
    """A trainer whose network and optimizer record their times."""

    def watch(self) -> dict[str, float]:
        """Start measuring; the seconds of network forward and optimizer are added up in the result.

        Autograd takes the latest operations first, so both losses are done when the gradient
        reaches the first of the network's outputs; from there to the end of `backward`, where
        the optimizer's part begins, the time is the network's.
        """
        spent = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
        marks: dict[str, float] = {}

        def now(name: str) -> None:
            marks[name] = time.perf_counter()

        def reached(grad: Tensor) -> None:
            marks.setdefault("backward", time.perf_counter())

        def after_forward(_module: Any, _args: Any, outputs: tuple[Tensor, ...]) -> None:
            spent["forward"] += time.perf_counter() - marks["forward"]
            for output in outputs:
                output.register_hook(reached)

        self.model.register_forward_pre_hook(lambda *_: now("forward"))
        self.model.register_forward_hook(after_forward)
        backward, step = Tensor.backward, self.step

        def whole_backward(*args: Any, **kwargs: Any) -> None:
            backward(*args, **kwargs)
            now("optimizer")
            spent["backward"] += marks["optimizer"] - marks.pop("backward")

        def whole_step(*args: Any) -> dict[str, Tensor]:
            losses = step(*args)
            spent["optimizer"] += time.perf_counter() - marks["optimizer"]
            return losses

        Tensor.backward = whole_backward  # type: ignore[method-assign]
        self.step = whole_step  # type: ignore[method-assign]
        return spent


def training_steps() -> dict[str, Any]:
    """Steps of the preset `tiny` as it is, and of the paper's network on half its canvas."""
    tiny, r50 = PRESETS["tiny"], PRESETS["r50"]
    assert tiny.train.crop == (240, 240) and tiny.train.batch_size == 8
    small = tiny.detector.image_size
    half = tuple(side // 2 for side in r50.detector.image_size)
    return {
        "tiny, 240x240, batch of 8": training_step(tiny.detector, tiny.train, small, 30, 12),
        f"r50, {half[0]}x{half[1]}, batch of 2": training_step(
            r50.detector.replace(image_size=half),
            r50.train.replace(batch_size=2, crop=None),
            half,
            repetitions=5,
            warm_up=2,
        ),
    }


def training_step(
    config: RetinaNetConfig,
    train: TrainConfig,
    size: tuple[int, ...],
    repetitions: int,
    warm_up: int,
) -> dict[str, Any]:
    """Median milliseconds of the parts of a step."""
    # As many objects an image as the blood cells have, few enough images that the loader keeps
    # them all decoded after the warm-up, as it does in a run of several epochs.
    dataset = ShapesDataset("train", size=size, num_images=4 * train.batch_size, num_objects=14)
    model = backend_torch.build(config.replace(classes=dataset.classes), 0, "cpu")
    trainer = SplitTrainer(model, train)
    batches = train_batches(dataset, model.config, train)
    backward = Tensor.backward
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
        Tensor.backward = backward  # type: ignore[method-assign]
        batches.close()  # type: ignore[attr-defined]
    parts = {name: [step[name] * 1e3 for step in steps[warm_up:]] for name in steps[0]}
    shares = [step["the rest"] / step["step"] for step in steps[warm_up:]]
    return {
        **{name: summary(values) for name, values in parts.items()},
        "share_of_the_rest": round(statistics.median(shares), 3),
        "precision": trainer.precision,
    }
