"""The JAX RetinaNet: what JAX alone has; the rest is in tests/retinanet/test_network.py."""

import math

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("optax")
pytest.importorskip("safetensors")
import jax
import jax.numpy as jnp
import optax
import pytorch_side
from detectors import CONFIG, pictures
from flax import nnx

from focal.retinanet import TrainConfig
from focal.retinanet.architecture import BACKBONES
from focal.retinanet.data import ShapesDataset, train_batches
from focal.retinanet.jax import network as network_jax
from focal.retinanet.jax import trainer as ours

RUN = TrainConfig(batch_size=4, precision="float32", flips="none", workers=0)


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Fewer optimizations: the time of these tests is that of compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_the_widest_backbone_has_pytorchs_grouped_blocks(pytorch):
    net, norm = BACKBONES["resnext101_32x8d"], "frozen_batch"
    block = network_jax.Bottleneck(64, 64, 2, net, network_jax._NORMS[norm], nnx.Rngs(0))
    tensors = network_jax.arrays(nnx.state(block))
    assert tensors["conv2.weight"].shape == (256, 8, 3, 3)
    x = np.random.default_rng(0).normal(size=(2, 9, 7, 64)).astype(np.float32)
    _, expected, _ = pytorch(pytorch_side.bottleneck, net, norm, (64, 64, 2), x, tensors)
    np.testing.assert_allclose(block(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_models_of_one_config_are_compiled_once(monkeypatch):
    traces, whole = [], network_jax.RetinaNet.__call__

    def counting(self, images):
        traces.append(images.shape)
        return whole(self, images)

    monkeypatch.setattr(network_jax.RetinaNet, "__call__", counting)
    config = CONFIG.replace(channels=8, max_detections=7)
    images, sizes = pictures(1, (64, 64)), np.array([[64, 64]])
    for seed in range(3):
        model = ours.build(config, seed, "cpu")
        ours.raw_outputs(model, images)
        ours.detect(model, images, sizes)
        ours.load_state(model, ours.state(model))
        ours.raw_outputs(model, images)
    assert traces == [images.shape]
    ours.raw_outputs(model, pictures(2, (64, 64)))
    ours.raw_outputs(ours.build(config.replace(max_detections=8), 0, "cpu"), images)
    assert len(traces) == 3


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_optimizers_are_pytorchs(pytorch, optimizer):
    run = RUN.replace(optimizer=optimizer, weight_decay=0.1, momentum=0.8, clip_norm=2.0)
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 7)).astype(np.float32)
    scales, rates = (1.0, 0.1, 3.0, 0.01), (0.1, 0.3, 0.01, 0.2)
    slopes = [scale * rng.normal(size=start.shape).astype(np.float32) for scale in scales]
    reference = pytorch(pytorch_side.optimize, run, [start], [[x] for x in slopes], rates)
    rule, value = ours._optimizer(run), jnp.asarray(start)
    slots = rule.init(value)
    for slope, rate, (expected,) in zip(slopes, rates, reference, strict=True):
        updates, slots = rule.update(jnp.asarray(slope), slots, value)
        value = optax.apply_updates(value, rate * updates)
        # Optax corrects AdamW's bias in float32, which costs 3e-5 in the first steps.
        change = np.abs(value - start).max()
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-4 * change)


def test_a_state_without_a_part_of_the_optimizers_is_refused():
    run = RUN.replace(optimizer="adamw", clip_norm=10.0, ema=0.9)
    trainer = ours.Trainer(ours.build(CONFIG, 0, "cpu"), run)
    saved = trainer.state()
    del saved["optimizer/1/0/count"]
    with pytest.raises(ValueError, match=r"1 missing \(1/0/count\)"):
        trainer.load_state(saved)


def test_images_without_boxes_are_no_trouble():
    data = ShapesDataset("train", size=(64, 64), num_images=4, num_objects=0)
    batch = next(train_batches(data, CONFIG, RUN))
    assert (batch.labels < 0).all()
    trainer = ours.Trainer(ours.build(CONFIG, 0, "cpu"), RUN)
    parts = {k: float(v) for k, v in trainer.step(0, batch, 0.01).items()}
    assert 0 < parts["classification"] < math.inf
    assert parts["box"] == 0 and parts["positives"] == 1
    assert all(np.isfinite(x).all() for x in trainer.weights().values())
