"""The JAX RetinaNet: what JAX alone has; the rest is in tests/retinanet/test_network.py."""

import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

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

import focal
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


def test_a_fixed_normalization_keeps_no_float32_maps_for_the_backward_pass():
    model = ours.build(CONFIG.replace(norm="frozen_batch"), 0, "cpu")
    model.train(dtype=jnp.dtype("bfloat16"))
    parameters, statistics = nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))

    def backward(parameters, images):
        def forward(parameters):
            return nnx.merge(nnx.graphdef(model), parameters, statistics)(images)

        return jax.vjp(forward, parameters)[1]

    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.bfloat16)
    kept = jax.tree.leaves(jax.eval_shape(backward, parameters, images))
    maps = [x for x in kept if x.ndim == 4 and x.shape[0] == 2]
    assert len(maps) > 20
    assert {x.dtype.name for x in maps} == {"bfloat16", "bool"}  # bool: where a ReLU let through


# Devices


def with_devices(count, script):
    """Run it in a process with this number of CPU devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        "PYTHONPATH": str(Path(focal.__file__).parents[1]),
    }
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_is_on_the_device_that_is_named():
    with_devices(
        3,
        """
        import jax, numpy as np
        from focal.retinanet import PRESETS, TrainConfig, build
        from focal.retinanet.data.loader import Batch
        from focal.retinanet.jax import trainer as ours

        jax.config.update("jax_disable_most_optimizations", True)
        first, second, _ = jax.devices()

        def devices():
            return set().union(*(x.devices() for x in jax.live_arrays()))

        config = PRESETS["tiny"].detector.replace(
            classes=("a",), image_size=(64, 64), channels=8, head_depth=1
        )
        run = TrainConfig(batch_size=2, precision="float32", optimizer="adamw", ema=0.9)
        images, sizes = np.zeros((2, 64, 64, 3), np.uint8), np.full((2, 2), 64)
        boxes, labels = np.full((2, 1, 4), (8, 8, 40, 40), np.float32), np.zeros((2, 1), np.int64)
        batch = Batch(images, boxes, labels, sizes, np.ones(2), np.arange(2), sizes)

        assert ours.replicas("cpu").count == ours.replicas().count == 3
        assert ours.replicas("cpu:1").count == 1 and ours.replicas("cpu:1").handle is None
        model = build(config, "jax", device="CPU:1")
        assert devices() == {second}
        for result in (
            ours._raw_outputs(*ours.nnx.split(model), images),
            ours._detections(*ours.nnx.split(model), images, sizes),
        ):
            assert {d for x in result for d in x.devices()} == {second}
        trainer = ours.Trainer(model, run, ours.replicas("cpu:1"))
        for number in range(2):
            found = trainer.step(number, batch, 1e-3)
            assert {d for x in found.values() for d in x.devices()} == {second}
            trainer.load_state(trainer.state())
            assert devices() == {second}, "nothing is left on another"
        assert jax.numpy.zeros(1).devices() == {first}, "the default is the user's"

        for name in ("cpu:3", "cpu:-1", "cpu:x"):
            for function in (ours.replicas, lambda name: build(config, "jax", device=name)):
                try:
                    function(name)
                except ValueError as error:
                    expected = f"device '{name}' cannot be used: JAX has cpu:0, cpu:1, cpu:2 here"
                    assert str(error) == expected, error
                else:
                    raise AssertionError(name)
        """,
    )


def test_one_device_cannot_be_that_of_several_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="'cpu:0' cannot be used by several processes: expected a"):
        ours.replicas("cpu:0")


def device(platform, **attributes):
    return SimpleNamespace(platform=platform, **attributes)


@pytest.mark.parametrize(
    ("devices", "precision"),
    [
        ([device("cpu")], "float32"),
        ([device("tpu")], "bfloat16"),
        ([device("gpu", compute_capability="7.0")], "float32"),  # V100
        ([device("gpu", compute_capability="7.5")], "float32"),  # T4
        ([device("gpu", compute_capability="8.0")], "bfloat16"),
        ([device("gpu", compute_capability="9.0")], "bfloat16"),
        ([device("gpu", compute_capability="12.0")], "bfloat16"),
        ([device("gpu", compute_capability="gfx90a")], "float32"),  # AMD's: not tried
        ([device("gpu")], "float32"),
        ([device("gpu", compute_capability=c) for c in ("8.0", "7.5")], "float32"),
        ([device("gpu", compute_capability=c) for c in ("8.0", "9.0")], "bfloat16"),
    ],
)
def test_auto_is_bfloat16_where_every_device_multiplies_it(devices, precision):
    assert ours._fast_precision(devices) == precision


def test_a_step_waits_for_no_value(monkeypatch):
    """All is asked for without values, as a device that is still busy has none."""
    trainer = ours.Trainer(ours.build(CONFIG, 0, "cpu"), RUN)
    data = ShapesDataset("train", size=(64, 64), num_images=4, num_objects=4)
    batch = next(train_batches(data, CONFIG, RUN))
    monkeypatch.setattr(nnx, "update", lambda *_: None)  # nnx refuses variables without values

    def step(run):
        trainer.run = run
        return trainer.step(0, batch, 0.01), trainer.run

    shapes = jax.tree.map(jnp.shape, trainer.run)
    found, after = jax.eval_shape(step, trainer.run)
    assert {x.shape for x in found.values()} == {()}
    assert jax.tree.map(jnp.shape, after) == shapes
