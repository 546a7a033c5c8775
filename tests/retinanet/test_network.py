"""The detector in every framework: PyTorch's weights, outputs, detections and training steps."""

import importlib
import math

import numpy as np
import pytest

pytest.importorskip("safetensors")
import pytorch_side
from backends import RETINANETS
from detectors import CONFIG, assert_near, assert_same, pictures

from focal.core.anchors import AnchorConfig
from focal.retinanet import TrainConfig, build, load, save
from focal.retinanet.data import ShapesDataset, train_batches
from focal.retinanet.detector import backend_module
from focal.retinanet.objective import EMA_START
from focal.retinanet.weights import load_weights, part

FIVE_LEVELS = CONFIG.replace(
    levels=(3, 4, 5, 6, 7),
    anchors=AnchorConfig(strides=(8, 16, 32, 64, 128), sizes=(12.0, 24.0, 48.0, 96.0, 192.0)),
)
SGD = TrainConfig(batch_size=4, weight_decay=1e-4, precision="float32", flips="none", workers=0)
ADAMW = SGD.replace(optimizer="adamw", weight_decay=0.01, clip_norm=10.0, ema=0.9)
CONV1 = "backbone.body.conv1.weight"
CLASS_BIAS = "head.classification_head.cls_logits.bias"


@pytest.fixture(params=RETINANETS, scope="module")
def name(request):
    """The framework."""
    return request.param


@pytest.fixture(scope="module")
def backend(name, quick_jax):
    """The detector's module of the framework."""
    for module in {"torch": ("torch",), "jax": ("flax", "optax"), "tensorflow": ("keras",)}[name]:
        pytest.importorskip(module)
    return backend_module(name)


not_torch = pytest.mark.parametrize("name", RETINANETS[1:], indirect=True, scope="module")
"""For what compares with PyTorch."""


@pytest.fixture
def traces(name, backend, monkeypatch):
    """Grows by one whenever the network is traced, that is, compiled anew."""
    network = importlib.import_module(f"focal.retinanet.{name}.network").RetinaNet
    method = {"torch": "forward", "jax": "__call__", "tensorflow": "call"}[name]
    count, whole = [], getattr(network, method)

    def counting(self, images, *arguments, **options):
        count.append(images.shape)
        return whole(self, images, *arguments, **options)

    monkeypatch.setattr(network, method, counting)
    return count


def batch_of(config=CONFIG, **options):
    options = {"num_objects": 4, "object_size": (12, 32), **options}
    data = ShapesDataset("train", size=(64, 64), num_images=4, **options)
    return next(train_batches(data, config, SGD))


@pytest.fixture(scope="module")
def lively(pytorch):
    """Weights under which every layer matters: statistics and norms are not the initial ones."""

    def weights(config, seed=0):
        rng = np.random.default_rng(seed)
        tensors = pytorch(pytorch_side.initial, config, seed)
        for name, x in tensors.items():
            if name.endswith("running_var"):
                tensors[name] = rng.uniform(0.5, 2, x.shape).astype(np.float32)
            elif x.ndim == 1 and name != CLASS_BIAS:
                tensors[name] = x + rng.normal(0, 0.1, x.shape).astype(np.float32)
            elif name.startswith("head."):
                tensors[name] = 10 * x
        return tensors

    return weights


def detector(backend, config, weights):
    """A model with these weights."""
    model = backend.build(config, 1, "cpu")
    backend.load_state(model, weights)
    return model


# Weights


@pytest.mark.parametrize(
    "config",
    [
        CONFIG.replace(head_norm="group"),
        FIVE_LEVELS.replace(norm="group", head_norm="group", head_depth=2),
        FIVE_LEVELS.replace(backbone="resnet18", norm="frozen_batch"),
        FIVE_LEVELS.replace(backbone="resnet101", p6_from="c5", norm="group"),
    ],
    ids=lambda config: f"{config.backbone}-{config.norm}",
)
def test_names_shapes_and_parameters_are_those_of_the_weights_file(pytorch, backend, config):
    model = backend.build(config, 0, "cpu")
    shapes, parameters = pytorch(pytorch_side.shapes, config)
    found = backend.state(model)
    assert {name: x.shape for name, x in found.items()} == shapes
    assert all(x.dtype == np.float32 and x.flags["C_CONTIGUOUS"] for x in found.values())
    assert backend.describe(model)["parameters"] == parameters


def test_state_is_a_copy(backend, lively):
    first, second = (backend.build(CONFIG, seed, "cpu") for seed in (1, 2))
    tensors = lively(CONFIG)
    for x in tensors.values():
        x.flags.writeable = False
    backend.load_state(first, tensors)
    kept = backend.state(first)
    assert_same(kept, tensors)
    backend.load_state(second, kept)
    for x in kept.values():
        x += 1  # neither model notices
    assert_same(backend.state(first), tensors)
    assert_same(backend.state(second), tensors)


def test_load_state_names_what_does_not_fit(backend):
    model = backend.build(CONFIG, 0, "cpu")
    tensors = backend.state(model)
    without = {k: v for k, v in tensors.items() if k != CONV1}
    for wrong, message in (
        (without, r"1 missing \(backbone\.body\.conv1\.weight\)"),
        ({**tensors, "more": np.zeros(3)}, r"1 unexpected \(more\)"),
        (
            {**tensors, CONV1: tensors[CONV1][..., :1]},
            r"conv1\.weight \(16, 3, 3, 1\) for \(16, 3, 3, 3\)",
        ),
    ):
        with pytest.raises(ValueError, match=f"weights are not those of this network: .*{message}"):
            backend.load_state(model, wrong)
    assert_same(backend.state(model), tensors)


@not_torch
def test_files_go_to_pytorch_and_back(pytorch, name, backend, lively, tmp_path):
    start = lively(CONFIG)
    pytorch(pytorch_side.saved, CONFIG, start, tmp_path / "a.safetensors")
    model = load(tmp_path / "a.safetensors", backend=name, device="cpu")
    assert (model.backend, model.config) == (name, CONFIG)
    save(model, tmp_path / "b.safetensors")
    config, back = pytorch(pytorch_side.loaded, tmp_path / "b.safetensors")
    assert config == CONFIG
    assert_same(back, start)
    (first, config), (second, same) = (load_weights(tmp_path / f"{x}.safetensors") for x in "ab")
    assert_same(second, first)
    assert config == same


# Initial weights


def test_initial_weights_are_the_papers(backend):
    config = CONFIG.replace(channels=64, head_depth=2, prior=0.1)
    weights = backend.state(backend.build(config, 0, "cpu"))
    np.testing.assert_allclose(weights.pop(CLASS_BIAS), -math.log(9), rtol=1e-6)
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
            assert np.abs(x).max() > 2.5 * x.std(), name  # not truncated
        elif name.endswith("bias"):
            assert not x.any(), name


def test_the_seed_decides(backend):
    config = CONFIG.replace(head_depth=2)
    first, same, other = (backend.state(backend.build(config, s, "cpu")) for s in (1, 1, 2))
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
        (FIVE_LEVELS.replace(norm="frozen_batch", p6_from="p5"), (75, 101)),
        (FIVE_LEVELS.replace(norm="group", head_norm="group"), (129, 97)),
        (FIVE_LEVELS.replace(backbone="resnet50", p6_from="p5", head_depth=0), (65, 40)),
    ],
    ids=["tiny", "frozen", "group", "resnet50"],
)
@not_torch
def test_raw_outputs_are_pytorchs(pytorch, name, backend, lively, config, size):
    weights, images = lively(config), pictures(2, size)
    model = detector(backend, config, weights)
    if name == "jax":
        model.train()  # statistics stay fixed, whatever the mode
    found = backend.raw_outputs(model, images)
    expected = pytorch(pytorch_side.raw_outputs, config, weights, images)
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == np.float32 and np.ptp(other) > 0.1
        assert_near(mine, other, 1e-4)
    assert_same(backend.state(model), weights)


def test_no_images(backend):
    logits, deltas = backend.raw_outputs(backend.build(CONFIG, 0, "cpu"), pictures(0, (64, 64)))
    assert logits.shape == (0, 9 * 84, 3) and deltas.shape == (0, 9 * 84, 4)


@not_torch
def test_detections_are_pytorchs(pytorch, backend, lively):
    config = CONFIG.replace(score_threshold=0.0, candidates=200, max_detections=50)
    weights, sizes = lively(config), np.array([[64, 64], [40, 50], [64, 9]])
    model = detector(backend, config, weights)
    for count in (3, 1):  # the number of images may change
        images = pictures(count, (64, 64), seed=count)
        boxes, scores, labels = backend.detect(model, images, sizes[:count])
        expected_boxes, expected_scores, expected_labels = pytorch(
            pytorch_side.detect, config, weights, images, sizes[:count]
        )
        assert (expected_scores[:2] > 0).all()
        np.testing.assert_allclose(scores, expected_scores, rtol=1e-4)
        np.testing.assert_allclose(boxes, expected_boxes, rtol=1e-4, atol=1e-3)
        np.testing.assert_array_equal(labels, expected_labels)


# What cannot be built, and what is told of what was


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ()}, "at least one class; got none"),
        ({"levels": (3, 4)}, r"levels must be 3 to 5, 6 or 7; got \(3, 4\)"),
        ({"levels": (2, 3, 4, 5)}, "levels must be"),
    ],
)
def test_impossible_configs_are_refused(backend, change, message):
    strides = tuple(2**n for n in change.get("levels", CONFIG.levels))
    anchors = AnchorConfig(strides=strides, sizes=tuple(4.0 * s for s in strides))
    with pytest.raises(ValueError, match=message):
        backend.build(CONFIG.replace(anchors=anchors, **change), 0, "cpu")


@pytest.mark.parametrize("device", ["abacus", "tpu", "cuda:99"])
def test_a_device_that_is_not_there(name, backend, device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used: "):
        build(CONFIG, name, device=device)


def test_the_record_of_a_run(name, backend):
    record = backend.describe(backend.build(CONFIG, 0, "cpu"))
    assert record["device"].startswith("cpu (")
    packages = {"torch": ["torch"], "jax": ["jax", "flax", "optax"]}
    expected = packages.get(name, ["tensorflow", "keras"])
    assert record["versions"].keys() == {*expected, "python"}


# A step of training


@pytest.mark.parametrize(
    ("config", "run"),
    [
        (CONFIG, SGD.replace(ema=0.99)),
        (
            FIVE_LEVELS.replace(
                norm="frozen_batch", p6_from="p5", normalizer="image", box_loss="giou"
            ),
            SGD.replace(clip_norm=0.1),
        ),
        (
            FIVE_LEVELS.replace(
                backbone="resnet18", norm="group", head_norm="group", normalizer="ema", gamma=1.5
            ),
            SGD,
        ),
        (CONFIG, SGD.replace(freeze=3, ema=0.99)),
    ],
    ids=["batch", "frozen_batch-image-giou-clip", "resnet18-group-ema", "frozen-stages"],
)
@not_torch
def test_a_step_is_pytorchs(pytorch, name, backend, lively, config, run):
    before = lively(config)
    # A rate so large that the rounding of the weights themselves is no part of the change.
    task = 2, batch_of(config), 1e3
    expected, state, average = pytorch(pytorch_side.step, config, run, before, *task)
    trainer = backend.Trainer(detector(backend, config, before), run)
    found = {k: float(v) for k, v in trainer.step(*task).items()}
    assert list(found) == list(expected) and expected["positives"] > 4
    assert found == pytest.approx(expected, rel=1e-5)

    after = {k: v for k, v in trainer.state().items() if not k.startswith("optimizer/")}
    state = {k: v for k, v in state.items() if not k.startswith("optimizer/")}
    assert after.keys() == state.keys()  # each has its own optimizer
    for key, x in state.items():
        parameter = key.partition("/")[2]
        old = before.get(parameter, np.float32(EMA_START))
        if biased(name, key):
            assert np.all(np.abs(after[key] - x) <= (x - 0.9 * old) / 16 + 1e-6 * np.abs(x)), key
        else:
            assert_near(after[key] - old, x - old, 1e-4, key)
        if config.norm == "frozen_batch" and (".bn" in key or ".downsample.1." in key):
            np.testing.assert_array_equal(after[key], old)
    kept = trainer.weights()
    for key, x in average.items():
        if biased(name, key):  # an average moves by a share of what the variance does
            bound = (state[f"model/{key}"] - 0.9 * before[key]) / 16 + 1e-6 * np.abs(x)
            assert np.all(np.abs(kept[key] - x) <= bound), key
        else:
            assert_near(kept[key] - before[key], x - before[key], 1e-4, key)


@pytest.mark.parametrize(("stages", "recompute"), [(1, True), (3, False), (5, True)])
def test_frozen_stages_keep_their_weights_and_statistics(backend, lively, stages, recompute):
    before, batch = lively(CONFIG), batch_of(CONFIG)
    run = ADAMW.replace(freeze=stages, ema=0.5, recompute=recompute)
    trainer = backend.Trainer(detector(backend, CONFIG, before), run)
    for number in range(2):
        trainer.step(number, batch, 1e-2)
    after, kept = part(trainer.state(), "model/"), trainer.weights()
    frozen = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")[: stages + 1]
    for name, old in before.items():
        if name.startswith(tuple(f"backbone.body.{module}." for module in frozen)):
            np.testing.assert_array_equal(after[name], old, err_msg=name)
            # What is averaged with itself may be rounded.
            np.testing.assert_allclose(kept[name], old, rtol=1e-6, err_msg=name)
        else:
            assert (after[name] != old).any(), name
    again = backend.Trainer(detector(backend, CONFIG, lively(CONFIG)), run)
    again.load_state(trainer.state())
    for t in (trainer, again):
        t.step(2, batch, 1e-2)
    assert_same(again.state(), trainer.state())


def biased(framework, key):
    """Whether it is a variance of n pixels that is 1 - 1/n of PyTorch's, n being 16 or more."""
    return framework == "jax" and key.endswith("running_var")


def test_bfloat16_is_for_the_layers_of_a_step_only(pytorch, backend, lively):
    config = CONFIG.replace(head_norm="group")
    batch, before = batch_of(config), lively(config)
    half = backend.Trainer(
        detector(backend, config, before), SGD.replace(precision="bfloat16", ema=0.9)
    )
    found = {k: np.asarray(v) for k, v in half.step(0, batch, 1e-2).items()}
    parts, state, _ = pytorch(pytorch_side.step, config, SGD, before, 0, batch, 1e-2)
    assert found["loss"] != pytest.approx(parts["loss"], rel=1e-5)
    assert found["loss"] == pytest.approx(parts["loss"], rel=0.02)
    numbers = [*found.values(), *half.state().values(), *half.weights().values()]
    assert {x.dtype.name for x in numbers if x.dtype.kind not in "iu"} == {"float32"}
    after = backend.state(half.model)
    for name in (CONV1, "head.regression_head.bbox_reg.weight"):
        a, b = ((x - before[name]).ravel() for x in (after[name], state[f"model/{name}"]))
        assert np.dot(a, b) > 0.9 * np.linalg.norm(a) * np.linalg.norm(b)
    again = backend.raw_outputs(detector(backend, config, after), batch.images)
    for x, y in zip(backend.raw_outputs(half.model, batch.images), again, strict=True):
        np.testing.assert_array_equal(x, y)


def test_it_learns_and_goes_on_where_it_stopped(name, backend, traces):
    batch, trainer = batch_of(), backend.Trainer(backend.build(CONFIG, 0, "cpu"), ADAMW)
    model = trainer.model
    losses = [float(trainer.step(0, batch, 3e-3)["loss"])]
    first = len(traces)
    losses += [float(trainer.step(i, batch, 3e-3)["loss"]) for i in range(1, 25)]
    if name != "torch":
        assert len(traces) == first  # no later step compiles again
    saved = trainer.state()
    copied = {k: v.copy() for k, v in saved.items()}
    again = backend.Trainer(backend.build(CONFIG, 1, "cpu"), ADAMW)
    again.load_state(saved)
    assert_same(again.state(), saved)
    for number in range(25, 30):
        parts = [float(t.step(number, batch, 2e-3)["loss"]) for t in (trainer, again)]
        assert parts[0] == parts[1]
        losses.append(parts[0])
    assert losses[-1] < losses[0] / 5
    assert_same(saved, copied)  # later steps reuse the buffers
    assert_same(again.state(), trainer.state())
    if name == "jax":
        assert len(traces) == 1  # nor does a learning rate, or another trainer

    # The network is the caller's, and has the weights of the last step; the average is apart.
    assert trainer.model is model
    end, own = trainer.state(), backend.state(model)
    assert_same(part(end, "model/"), own)
    assert_same(part(end, "average/"), trainer.weights())
    assert (trainer.weights()[CONV1] != own[CONV1]).any()

    # A step that is not finite changes nothing, nor does any step after it.
    assert again.healthy
    spoilt = end | {f"model/{CLASS_BIAS}": np.full_like(own[CLASS_BIAS], 1e38)}
    again.load_state(spoilt)
    for number in (30, 31):
        parts = again.step(number, batch, 1e-3)
        assert not again.healthy and not math.isfinite(float(parts["loss"]))
        assert_same(again.state(), spoilt)
        assert_same(backend.state(again.model), part(spoilt, "model/"))
