"""The JAX RetinaNet is the PyTorch one: same weights, same outputs, same training step."""

import math
from importlib.util import find_spec

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("optax")
pytest.importorskip("safetensors")
import jax
import jax.numpy as jnp
import optax
import pytorch_side
from backends import ONLY
from flax import nnx

from focal.core.anchors import AnchorConfig
from focal.retinanet import (
    PRESETS,
    TrainConfig,
    build,
    load,
    save,
)
from focal.retinanet.architecture import BACKBONES
from focal.retinanet.data import ShapesDataset, train_batches
from focal.retinanet.jax import network as network_jax
from focal.retinanet.jax import trainer as ours
from focal.retinanet.objective import EMA_START
from focal.retinanet.weights import load_weights, part

CONFIG = PRESETS["tiny"].detector.replace(
    classes=("circle", "square", "triangle"),
    canvas=(64, 64),
    channels=16,
    head_depth=1,
    anchors=AnchorConfig(strides=(8, 16, 32), sizes=(12.0, 24.0, 48.0)),
)
FIVE_LEVELS = CONFIG.replace(
    levels=(3, 4, 5, 6, 7),
    anchors=AnchorConfig(strides=(8, 16, 32, 64, 128), sizes=(12.0, 24.0, 48.0, 96.0, 192.0)),
)
RUN = TrainConfig(
    steps=6,
    batch_size=4,
    optimizer="adamw",
    learning_rate=3e-3,
    weight_decay=0.01,
    warmup=2,
    clip_norm=10.0,
    ema=0.9,
    precision="float32",
    flips="none",
    workers=0,
    log_every=2,
    save_every=3,
)


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Fewer optimisations: the time of these tests is that of compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def traces(monkeypatch):
    """Grows by one whenever a function of the network is traced, that is, compiled anew."""
    count, whole = [], ours._normalised

    def counting(images, config):
        count.append(images.shape)
        return whole(images, config)

    monkeypatch.setattr(ours, "_normalised", counting)
    return count


def shapes(num_images=4, **options):
    options = {"num_objects": 4, "object_size": (12, 32), **options}
    return ShapesDataset("train", size=(64, 64), num_images=num_images, **options)


def batch_of(config=CONFIG, run=RUN):
    return next(train_batches(shapes(), config, run))


def pictures(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def lively(pytorch):
    """Weights under which every layer matters: statistics and norms are not the initial ones."""

    def weights(config, seed=0):
        rng = np.random.default_rng(seed)
        tensors = pytorch(pytorch_side.initial, config, seed)
        for name, x in tensors.items():
            if name.endswith("running_var"):
                tensors[name] = rng.uniform(0.5, 2, x.shape).astype(np.float32)
            elif x.ndim == 1 and "cls_logits" not in name:
                tensors[name] = x + rng.normal(0, 0.1, x.shape).astype(np.float32)
            elif name.startswith("head."):
                tensors[name] = 10 * x
        return tensors

    return weights


def detector(config, weights):
    """A model with these weights."""
    model = ours.build(config, 1, "cpu")
    ours.load_state(model, weights)
    return model


def assert_same(found, expected):
    """Equal bit for bit, all of them."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


# Weights


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        FIVE_LEVELS.replace(norm="group", head_norm="group", head_depth=2),
        FIVE_LEVELS.replace(backbone="resnet18", norm="frozen_batch"),
        FIVE_LEVELS.replace(backbone="resnet50", p6_from="p5", norm="frozen_batch"),
        FIVE_LEVELS.replace(backbone="resnet101", p6_from="c5", norm="group"),
    ],
    ids=lambda config: config.backbone,
)
def test_names_and_shapes_are_pytorchs(pytorch, config):
    model = ours.build(config, 0, "cpu")
    shapes, parameters = pytorch(pytorch_side.shapes, config)
    found = ours.state(model)
    assert {name: x.shape for name, x in found.items()} == shapes
    assert all(x.dtype == np.float32 and x.flags["C_CONTIGUOUS"] for x in found.values())
    assert ours.describe(model)["parameters"] == parameters


def test_the_widest_backbone_has_pytorchs_grouped_blocks(pytorch):
    net, norm = BACKBONES["resnext101_32x8d"], "frozen_batch"
    block = network_jax.Bottleneck(64, 64, 2, net, network_jax._NORMS[norm], nnx.Rngs(0))
    tensors = network_jax.arrays(nnx.state(block))
    assert tensors["conv2.weight"].shape == (256, 8, 3, 3)
    x = np.random.default_rng(0).normal(size=(2, 9, 7, 64)).astype(np.float32)
    _, expected, _ = pytorch(pytorch_side.bottleneck, net, norm, (64, 64, 2), x, tensors)
    np.testing.assert_allclose(block(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_state_round_trips(lively):
    first, second = ours.build(CONFIG, 1, "cpu"), ours.build(CONFIG, 2, "cpu")
    tensors = lively(CONFIG)
    for x in tensors.values():
        x.flags.writeable = False
    ours.load_state(first, tensors)
    kept = ours.state(first)
    assert_same(kept, tensors)
    ours.load_state(second, kept)
    for x in kept.values():
        x += 1  # a snapshot: neither model notices
    assert_same(ours.state(first), tensors)
    assert_same(ours.state(second), tensors)


def test_load_state_names_what_does_not_fit():
    model = ours.build(CONFIG, 0, "cpu")
    tensors = ours.state(model)
    name = "backbone.body.conv1.weight"
    with pytest.raises(ValueError, match=r"1 missing \(backbone\.body\.conv1\.weight\)"):
        ours.load_state(model, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(ValueError, match=r"1 unexpected \(more\)"):
        ours.load_state(model, {**tensors, "more": np.zeros(3)})
    with pytest.raises(ValueError, match=r"conv1\.weight \(16, 3, 3, 1\) for \(16, 3, 3, 3\)"):
        ours.load_state(model, {**tensors, name: tensors[name][..., :1]})
    assert_same(ours.state(model), tensors)


def test_files_go_from_pytorch_to_jax_and_back(pytorch, lively, tmp_path):
    start = lively(CONFIG)
    pytorch(pytorch_side.saved, CONFIG, start, tmp_path / "a.safetensors")
    model = load(tmp_path / "a.safetensors", backend="jax", device="cpu")
    assert (model.backend, model.config) == ("jax", CONFIG)
    save(model, tmp_path / "b.safetensors")
    config, back = pytorch(pytorch_side.loaded, tmp_path / "b.safetensors")
    assert config == CONFIG
    assert_same(back, start)
    (first, config), (second, same) = (load_weights(tmp_path / f"{x}.safetensors") for x in "ab")
    assert_same(second, first)
    assert config == same


# Initial weights


def test_initial_weights_are_the_papers():
    weights = ours.state(ours.build(CONFIG.replace(channels=64), 0, "cpu"))
    bias = weights.pop("head.classification_head.cls_logits.bias")
    np.testing.assert_allclose(bias, -math.log(99), rtol=1e-6)
    for name, x in weights.items():
        if name.startswith("head.") and name.endswith("weight"):
            assert x.mean() == pytest.approx(0, abs=5e-4), name
            assert x.std() == pytest.approx(0.01, rel=0.05), name
        elif name.startswith("backbone.fpn.") and name.endswith("weight"):
            fan_in = x[0].size
            assert x.std() == pytest.approx(fan_in**-0.5, rel=0.05), name
            assert np.abs(x).max() <= (3 / fan_in) ** 0.5, name
        elif name.startswith("backbone.body.layer") and "conv" in name:
            fan_out = x.shape[0] * 9
            assert x.std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
        elif name.endswith("bias"):
            assert not x.any(), name


def test_the_seed_decides():
    first, same, other = (ours.state(ours.build(CONFIG, seed, "cpu")) for seed in (1, 1, 2))
    assert_same(first, same)
    kernels = [name for name, x in first.items() if x.ndim == 4]
    assert all((first[name] != other[name]).all() for name in kernels)
    drawn = [first[name].ravel()[:9].tobytes() for name in kernels]
    assert len(set(drawn)) == len(kernels)  # no two layers begin alike


# Outputs


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (CONFIG, (64, 96)),
        (FIVE_LEVELS.replace(norm="group", head_norm="group"), (75, 101)),
        (FIVE_LEVELS.replace(backbone="resnet18", norm="frozen_batch"), (97, 130)),
        (FIVE_LEVELS.replace(backbone="resnet50", p6_from="p5"), (65, 40)),
    ],
    ids=["tiny", "odd", "resnet18", "resnet50"],
)
def test_raw_outputs_are_pytorchs(pytorch, lively, config, size):
    weights, images = lively(config), pictures(2, size)
    model = detector(config, weights)
    model.train()  # statistics stay fixed, whatever the mode
    found = ours.raw_outputs(model, images)
    expected = pytorch(pytorch_side.raw_outputs, config, weights, images)
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape and mine.dtype == np.float32
        assert np.ptp(other) > 0.1
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-4 * np.abs(other).max())
    assert_same(ours.state(model), weights)


def test_no_images():
    logits, deltas = ours.raw_outputs(ours.build(CONFIG, 0, "cpu"), pictures(0, (64, 64)))
    assert logits.shape == (0, 9 * 84, 3) and deltas.shape == (0, 9 * 84, 4)


def test_detections_are_pytorchs(pytorch, lively):
    config = CONFIG.replace(score_threshold=0.0, candidates=200, max_detections=50)
    weights, images = lively(config), pictures(2, (64, 64))
    sizes = np.array([[64, 64], [40, 50]])
    boxes, scores, labels = ours.detect(detector(config, weights), images, sizes)
    expected_boxes, expected_scores, expected_labels = pytorch(
        pytorch_side.detect, config, weights, images, sizes
    )
    assert (expected_scores > 0).all()
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-4)
    np.testing.assert_allclose(boxes, expected_boxes, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(labels, expected_labels)


def test_models_of_one_config_are_compiled_once(traces):
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


def test_a_device_that_is_not_there():
    for device in ("abacus", "tpu"):
        with pytest.raises(ValueError, match=rf"device '{device}' cannot be used: .*{device}"):
            build(CONFIG, "jax", device=device)
    description = ours.describe(ours.build(CONFIG, 0, "cpu"))
    assert description["device"].startswith("cpu (")
    assert description["versions"].keys() == {"jax", "flax", "optax", "python"}


# A step of training

SGD = RUN.replace(optimizer="sgd", weight_decay=1e-4, clip_norm=None, ema=None)


@pytest.mark.parametrize(
    ("config", "run"),
    [
        (CONFIG, SGD.replace(ema=0.9)),
        (
            CONFIG.replace(norm="frozen_batch", normaliser="image", box_loss="giou"),
            SGD.replace(clip_norm=0.1),
        ),
        (
            FIVE_LEVELS.replace(
                backbone="resnet18", norm="group", head_norm="group", normaliser="ema"
            ),
            SGD,
        ),
    ],
    ids=["batch", "frozen_batch-image-giou-clip", "resnet18-group-ema"],
)
def test_a_step_is_pytorchs(pytorch, lively, config, run):
    batch, before = batch_of(config, run), lively(config)
    mine = ours.Trainer(detector(config, before), run)
    found = {k: float(v) for k, v in mine.step(0, batch, 0.01).items()}
    expected, state, _ = pytorch(pytorch_side.step, config, run, before, 0, batch, 0.01)
    assert list(found) == list(expected) and expected["positives"] > 0
    # As the weights below: a sum over every gradient, with the rounding of all layers in it.
    assert found.pop("gradient_norm") == pytest.approx(expected.pop("gradient_norm"), rel=1e-4)
    assert found == pytest.approx(expected, rel=1e-5)

    found = mine.state()
    for name, x in state.items():
        kind, _, parameter = name.partition("/")
        if kind == "optimizer":
            continue  # each has its own
        change = np.abs(x - before.get(parameter, np.float32(EMA_START))).max()
        # The weights are rounded to float32 on the way, and optax rounds an average once more.
        atol = 1e-4 * change + (2e-7 if kind == "average" else 1e-7) * np.abs(x).max()
        if name.endswith("running_var"):
            # Of n pixels flax takes the biased variance, 1 - 1/n of PyTorch's; 16 are the fewest.
            atol = atol + (x - 0.9 * before[parameter]) / 16
        assert np.all(np.abs(found[name] - x) <= atol), name
    mine_only = {name for name in found if name not in state}
    assert all(name.startswith("optimizer/") for name in mine_only)
    frozen = [k for k in before if "bn" in k and config.norm == "frozen_batch"]
    assert all((found[f"model/{k}"] == before[k]).all() for k in frozen)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_optimisers_are_pytorchs(pytorch, optimizer):
    run = RUN.replace(optimizer=optimizer, weight_decay=0.1, momentum=0.8, clip_norm=2.0)
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 7)).astype(np.float32)
    scales, rates = (1.0, 0.1, 3.0, 0.01), (0.1, 0.3, 0.01, 0.2)
    slopes = [scale * rng.normal(size=start.shape).astype(np.float32) for scale in scales]
    reference = pytorch(pytorch_side.optimise, run, [start], [[x] for x in slopes], rates)
    rule, value = ours._optimiser(run), jnp.asarray(start)
    slots = rule.init(value)
    for slope, rate, (expected,) in zip(slopes, rates, reference, strict=True):
        updates, slots = rule.update(jnp.asarray(slope), slots, value)
        value = optax.apply_updates(value, rate * updates)
        # Optax corrects AdamW's bias in float32, which costs 3e-5 in the first steps.
        change = np.abs(value - start).max()
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-4 * change)


def test_it_learns_by_heart_and_goes_on_where_it_stopped(traces):
    batch, trainer = batch_of(), ours.Trainer(ours.build(CONFIG, 0, "cpu"), RUN)
    model = trainer.model
    losses = [float(trainer.step(i, batch, 3e-3)["loss"]) for i in range(25)]
    saved = trainer.state()
    assert all(x.flags["OWNDATA"] for x in saved.values())  # later steps reuse the buffers
    again = ours.Trainer(ours.build(CONFIG, 1, "cpu"), RUN)
    again.load_state(saved)
    assert_same(again.state(), saved)
    for number in range(25, 30):
        parts = [float(t.step(number, batch, 2e-3)["loss"]) for t in (trainer, again)]
        assert parts[0] == parts[1]
        losses.append(parts[0])
    assert losses[-1] < losses[0] / 5
    assert_same(again.state(), trainer.state())
    assert len(traces) == 1  # neither a step, nor a learning rate, nor a trainer compiles again

    # The network is the caller's, and has the weights of the last step; the average is apart.
    assert trainer.model is model
    end, own = trainer.state(), ours.state(model)
    assert_same({name: end[f"model/{name}"] for name in own}, own)
    assert_same({name: end[f"average/{name}"] for name in own}, trainer.weights())
    name = "head.classification_head.cls_logits.weight"
    assert (trainer.weights()[name] != own[name]).any()

    del saved["optimizer/1/0/count"]
    with pytest.raises(ValueError, match=r"1 missing \(1/0/count\)"):
        again.load_state(saved)


def test_bfloat16_is_for_the_layers_only(pytorch, lively):
    config = CONFIG.replace(head_norm="group")
    batch, before = batch_of(config), lively(config)
    half = ours.Trainer(detector(config, before), SGD.replace(precision="bfloat16"))
    found = float(half.step(0, batch, 1e-2)["loss"])
    parts, _, full = pytorch(pytorch_side.step, config, SGD, before, 0, batch, 1e-2)
    expected = parts["loss"]
    assert found != pytest.approx(expected, rel=1e-5)
    assert found == pytest.approx(expected, rel=0.02)
    numbers = jax.tree.leaves(half.run._replace(healthy=None))
    assert {x.dtype for x in numbers} == {jnp.dtype("float32")}
    for name in ("backbone.body.conv1.weight", "head.regression_head.bbox_reg.weight"):
        a, b = ((x[name] - before[name]).ravel() for x in (half.weights(), full))
        assert np.dot(a, b) > 0.9 * np.linalg.norm(a) * np.linalg.norm(b)


def test_images_without_boxes_are_no_trouble():
    batch = next(train_batches(shapes(num_objects=0), CONFIG, RUN))
    assert (batch.labels < 0).all()
    trainer = ours.Trainer(ours.build(CONFIG, 0, "cpu"), RUN)
    parts = {k: float(v) for k, v in trainer.step(0, batch, 0.01).items()}
    assert 0 < parts["classification"] < math.inf
    assert parts["box"] == 0 and parts["positives"] == 1
    assert all(np.isfinite(x).all() for x in trainer.weights().values())


@pytest.mark.skipif(
    bool(ONLY) and find_spec("pycocotools") is None, reason="images for GPUs are without it"
)
def test_the_training_loop_runs_on_it(tmp_path):
    pytest.importorskip("pycocotools")
    from focal.retinanet.training.loop import train

    data = shapes()
    options = {"backend": "jax", "device": "cpu"}
    model = train(CONFIG, RUN, data, data, tmp_path, **options)
    tensors, config = load_weights(tmp_path / "weights.safetensors")
    assert config == CONFIG
    assert_same(ours.state(model), tensors)
    resumed = train(CONFIG, RUN, data, None, tmp_path, resume=True, **options)
    assert_same(ours.state(resumed), tensors)


def test_a_step_that_is_not_finite_changes_nothing():
    batch, trainer = batch_of(), ours.Trainer(ours.build(CONFIG, 0, "cpu"), RUN)
    parts = trainer.step(0, batch, 1e-3)
    assert trainer.healthy and 0 < float(parts["gradient_norm"]) < math.inf
    spoilt = trainer.state()
    spoilt["model/head.classification_head.cls_logits.bias"][:] = 1e38
    trainer.load_state(spoilt)
    for number in (1, 2):  # nor does any step after it
        parts = trainer.step(number, batch, 1e-3)
        assert not trainer.healthy and not math.isfinite(float(parts["loss"]))
        assert_same(trainer.state(), spoilt)
        assert_same(ours.state(trainer.model), part(spoilt, "model/"))
