"""The TensorFlow detector: outputs, detections and training steps are those of PyTorch's."""

import gc
import runpy
import weakref

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
pytest.importorskip("safetensors")

import pytorch_side  # noqa: E402

from focal.core.anchors import AnchorConfig  # noqa: E402
from focal.retinanet import (  # noqa: E402
    RetinaNetConfig,
    TrainConfig,
    build,
    load,
    predict,
    save,
)
from focal.retinanet.architecture import Backbone  # noqa: E402
from focal.retinanet.data import ShapesDataset, train_batches  # noqa: E402
from focal.retinanet.tensorflow import network as network_tensorflow  # noqa: E402
from focal.retinanet.tensorflow import trainer as backend_tf  # noqa: E402

SMALL = RetinaNetConfig(
    classes=("circle", "square", "triangle"),
    canvas=(64, 96),
    backbone="tiny",
    norm="batch",
    channels=16,
    head_depth=1,
    allow_low_quality=0.2,
)
THREE = {"levels": (3, 4, 5), "anchors": AnchorConfig((8, 16, 32), (12.0, 24.0, 48.0))}
RUN = TrainConfig(batch_size=2, weight_decay=1e-4, precision="float32", workers=0)


def detector(config, weights):
    """A model with these weights."""
    model = build(config, "tensorflow", device="cpu")
    backend_tf.load_state(model, weights)
    return model


def varied(tensors, seed=0):
    """The weights with norms that do something, as in a trained network."""
    rng = np.random.default_rng(seed)
    ranges = {"running_mean": (-0.2, 0.2), "running_var": (0.5, 2.0)}
    return {
        name: rng.uniform(*ranges[part], x.shape).astype(np.float32)
        if (part := name.rpartition(".")[2]) in ranges
        else x
        for name, x in tensors.items()
    }


def batches(config, run=RUN):
    return train_batches(ShapesDataset("train", size=config.canvas, num_images=8), config, run)


def pictures(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


def assert_near(found, expected, tolerance, name=""):
    """Within a share of the largest value."""
    assert found.shape == expected.shape, name
    limit = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit, err_msg=name)


def assert_same(found, expected):
    """Equal bit for bit, all of them."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


# Names and outputs


@pytest.mark.parametrize(
    "options",
    [
        {"head_norm": "group", **THREE},
        {"backbone": "resnet18", "norm": "group"},
        {"backbone": "resnet50", "norm": "frozen_batch", "p6_from": "p5"},
    ],
    ids=["tiny", "resnet18", "resnet50"],
)
def test_names_and_shapes_are_those_of_the_weights_file(pytorch, options):
    config = SMALL.replace(**options)
    expected, _ = pytorch(pytorch_side.shapes, config)
    model = network_tensorflow.build_network(config, seed=0)
    found = network_tensorflow.state(model)
    assert {name: x.shape for name, x in found.items()} == expected
    assert len(model.variables) == len(found)
    assert all(x.dtype == np.float32 and x.flags["C_CONTIGUOUS"] for x in found.values())


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (64, 96)),
        ({"p6_from": "p5", "norm": "frozen_batch"}, (75, 101)),
        ({"norm": "group", "head_norm": "group", **THREE}, (129, 97)),
        ({"backbone": "resnet18"}, (65, 88)),
        ({"backbone": "resnet50", "norm": "frozen_batch", "head_depth": 0}, (64, 72)),
    ],
    ids=["tiny", "frozen", "group", "resnet18", "resnet50"],
)
def test_raw_outputs_are_pytorchs(pytorch, options, size):
    config, images = SMALL.replace(**options), pictures(2, *size)
    weights = varied(pytorch(pytorch_side.initial, config, 0))
    expected = pytorch(pytorch_side.raw_outputs, config, weights, images)
    found = backend_tf.raw_outputs(detector(config, weights), images)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == np.float32
        assert_near(a, b, 1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_grouped_bottleneck_learns_on_every_device(pytorch, stride):
    net = Backbone("bottleneck", (1, 1, 1, 1), groups=4, width_per_group=8)
    conv = network_tensorflow.Conv
    theirs = network_tensorflow.Bottleneck(
        8,
        32,
        stride,
        net,
        lambda *a, **k: conv(*a, use_bias=False, **k),
        network_tensorflow._group_norm,
    )
    x = np.random.default_rng(0).normal(size=(2, 9, 7, 8)).astype(np.float32)
    tensors, y, expected = pytorch(pytorch_side.bottleneck, net, "group", (8, 32, stride), x)
    variables = network_tensorflow.named_variables(theirs)
    network_tensorflow.assign(variables, tensors)

    @tf.function(autograph=False)
    def outputs_and_gradients(x):
        with tf.GradientTape() as tape:
            y = theirs(x, training=True)
            loss = tf.reduce_sum(tf.square(y))
        return y, tape.gradient(loss, {name: v.value for name, v in variables.items()})

    found, gradients = outputs_and_gradients(x)
    assert_near(found.numpy(), y, 1e-5)
    for name, x in network_tensorflow.arrays(gradients).items():
        assert_near(x, expected[name], 1e-5, name)


def test_detections_are_pytorchs(pytorch):
    config = SMALL.replace(score_threshold=0.0, max_detections=30)
    weights = varied(pytorch(pytorch_side.initial, config, 0))
    # Scores far apart, so that rounding changes no rank.
    weights["head.classification_head.cls_logits.weight"] *= 100
    model = detector(config, weights)
    for count in (2, 1, 3):  # the number of images may change
        images, sizes = (
            pictures(count, 64, 96, seed=count),
            np.array([[64, 96], [40, 96], [64, 50]]),
        )
        boxes, scores, labels = backend_tf.detect(model, images, sizes[:count])
        expected_boxes, expected_scores, expected_labels = pytorch(
            pytorch_side.detect, config, weights, images, sizes[:count]
        )
        assert (expected_scores > 0).sum() > 10 * count
        np.testing.assert_allclose(scores, expected_scores, rtol=1e-4)
        np.testing.assert_array_equal(labels, expected_labels)
        np.testing.assert_allclose(boxes, expected_boxes, atol=1e-3)


def test_an_empty_batch():
    model = build(SMALL, "tensorflow", device="cpu")
    images = np.zeros((0, 64, 96, 3), np.uint8)
    logits, deltas = backend_tf.raw_outputs(model, images)
    assert logits.shape == (0, 1161, 3) and deltas.shape == (0, 1161, 4)


def test_p7_is_from_the_rectified_p6_and_p6_stays_as_it_is():
    fpn = network_tensorflow.build_network(SMALL, seed=0).backbone["fpn"]
    rng = np.random.default_rng(0)
    features = [
        tf.constant(rng.normal(size=(1, s, s, c)), tf.float32)
        for c, s in ((64, 8), (128, 4), (128, 2))
    ]
    *_, p6, p7 = fpn(features)
    assert (p6.numpy() < 0).any()
    np.testing.assert_array_equal(p7, fpn.extra_blocks["p7"](tf.nn.relu(p6)))


# Initial weights


def test_initial_weights_are_the_papers():
    tensors = backend_tf.state(build(SMALL.replace(channels=64), "tensorflow", device="cpu"))
    for name, x in tensors.items():
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
        elif name.endswith("cls_logits.bias"):
            np.testing.assert_allclose(x, -np.log(99), rtol=1e-6)
        elif name.endswith("bias"):
            assert not x.any(), name


def test_no_two_layers_start_alike():
    tensors = backend_tf.state(build(SMALL.replace(head_depth=2), "tensorflow", device="cpu"))
    kernels = [x.ravel()[:50].tobytes() for x in tensors.values() if x.ndim == 4]
    assert len(set(kernels)) == len(kernels)


def test_the_seed_decides_and_global_random_state_is_kept():
    def seed():
        keras.utils.clear_session()  # older versions keep their generator otherwise
        keras.utils.set_random_seed(5)

    def draws():
        return float(tf.random.normal(())), float(keras.random.normal(()))

    seed()
    expected = draws()
    seed()
    first, same, other = (backend_tf.state(build(SMALL, "tensorflow", s)) for s in (1, 1, 2**40))
    assert draws() == expected
    assert_same(first, same)
    name = "backbone.body.conv1.weight"
    assert (first[name] != other[name]).all()


# Training

CASES = {
    "batch": THREE,
    "group": {"backbone": "resnet18", "norm": "group", "head_norm": "group"},
    "frozen, image": {"norm": "frozen_batch", "p6_from": "p5", "normaliser": "image"},
    "giou, ema": {"box_loss": "giou", "normaliser": "ema", "gamma": 1.5, **THREE},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_pytorchs(pytorch, case):
    config, run = SMALL.replace(**CASES[case]), RUN.replace(ema=0.99)
    before = varied(pytorch(pytorch_side.initial, config, 0))
    # A rate so large that the rounding of the weights themselves is no part of the change.
    task = 2, next(batches(config)), 1e3
    expected, state, average = pytorch(pytorch_side.step, config, run, before, *task)
    trainer = backend_tf.Trainer(detector(config, before), run)
    found = {name: float(x) for name, x in trainer.step(*task).items()}
    assert expected["positives"] > 4
    assert found == pytest.approx(expected, rel=1e-5)
    after, averages = trainer.state(), trainer.weights()
    for name, x in before.items():
        change = state[f"model/{name}"] - x
        if case.startswith("frozen") and (".bn" in name or ".downsample.1." in name):
            assert not np.any(change), name
        assert_near(after[f"model/{name}"] - x, change, 1e-4, name)
        assert_near(averages[name] - x, average[name] - x, 1e-4, name)


@pytest.mark.parametrize("optimizer", ["sgd", "sgd without momentum", "adamw"])
def test_optimisers_are_pytorchs(pytorch, optimizer):
    """The same gradients of two variables in both frameworks."""
    run = RUN.replace(optimizer=optimizer.split()[0], weight_decay=0.1)
    if "without" in optimizer:
        run = run.replace(momentum=0.0)
    rng = np.random.default_rng(0)
    start = [rng.normal(size=s).astype(np.float32) for s in ((3, 4), (5,))]
    gradients = [[5 * rng.normal(size=x.shape) for x in start] for _ in range(6)]
    rates = (0.01, 0.02, 0.1, 0.001, 0.01, 0.01)
    *_, expected = pytorch(pytorch_side.optimise, run, start, gradients, rates)

    variables = [keras.Variable(x) for x in start]
    ours = backend_tf._optimizer(run)
    ours.build(variables)
    for of_a_step, rate in zip(gradients, rates, strict=True):
        ours.learning_rate.assign(rate)
        ours.apply([tf.constant(g, tf.float32) for g in of_a_step], variables)
    for variable, x in zip(variables, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), x, rtol=1e-5, atol=1e-5)


LEARN = RUN.replace(
    batch_size=4, optimizer="adamw", weight_decay=0.01, clip_norm=10.0, ema=0.9, flips="none"
)


@pytest.fixture(scope="module")
def learnt():
    """A trainer after forty steps, its state after thirty, and what it lost on the way."""
    config = SMALL.replace(norm="batch", **THREE)
    trainer = backend_tf.Trainer(build(config, "tensorflow", device="cpu"), LEARN)
    source = batches(config, LEARN)
    some = [next(source) for _ in range(2)]
    losses, middle = [], None
    for number in range(40):
        if number == 30:
            middle = trainer.state()
        parts = trainer.step(number, some[number % 2], 3e-3 * (1 - number / 100))
        losses.append(float(parts["loss"]))
    return trainer, middle, losses, some


def test_it_learns_a_few_images(learnt):
    _, _, losses, _ = learnt
    assert losses[-1] < losses[0] / 3


def test_the_step_is_traced_once(learnt):
    trainer, *_ = learnt
    assert trainer._compiled.experimental_get_tracing_count() == 1


def test_it_goes_on_where_it_stopped(learnt):
    trainer, middle, losses, some = learnt
    model = build(trainer.model.config, "tensorflow", seed=9, device="cpu")
    second = backend_tf.Trainer(model, LEARN)
    second.load_state(middle)
    for number in range(30, 40):
        parts = second.step(number, some[number % 2], 3e-3 * (1 - number / 100))
        assert float(parts["loss"]) == losses[number]
    assert_same(second.state(), trainer.state())


def test_a_step_that_is_not_finite_changes_nothing(learnt):
    trainer, _, _, (batch, _) = learnt
    before = trainer.state()
    assert trainer.healthy
    spoilt = before | {
        "model/head.classification_head.cls_logits.bias": np.full(27, 1e38, np.float32)
    }
    trainer.load_state(spoilt)
    for number in (40, 41):  # nor does any step after it
        parts = trainer.step(number, batch, 1e-3)
        assert not trainer.healthy and not np.isfinite(parts["loss"])
        assert_same(trainer.state(), spoilt)
    trainer.load_state(before)
    trainer._healthy.assign(True)
    assert 0 < float(trainer.step(40, batch, 1e-3)["gradient_norm"]) < np.inf
    trainer.load_state(before)


def test_half_precision_trains_float32_weights():
    config = SMALL.replace(norm="batch", head_norm="group", **THREE)
    run = RUN.replace(precision="bfloat16")
    trainer = backend_tf.Trainer(build(config, "tensorflow", device="cpu"), run)
    batch = next(batches(config))
    parts = [trainer.step(number, batch, 0.02) for number in range(6)]
    assert {x.dtype for x in parts[0].values()} == {tf.float32}
    assert float(parts[-1]["loss"]) < 0.9 * float(parts[0]["loss"])
    assert {v.dtype for v in trainer.model.variables} == {"float32"}
    # The step alone computed in bfloat16, and it did.
    again = build(config, "tensorflow", device="cpu")
    backend_tf.load_state(again, backend_tf.state(trainer.model))
    x = tf.cast(batch.images, tf.float32) / 255
    with backend_tf._computing(again, "bfloat16"):
        half = again(x)
    for found, expected, low in zip(trainer.model(x), again(x), half, strict=True):
        assert (found.dtype, low.dtype) == (tf.float32, tf.bfloat16)
        np.testing.assert_array_equal(found, expected)


# The facade, and what surrounds a model


def test_weights_travel_between_the_frameworks(pytorch, tmp_path):
    weights = varied(pytorch(pytorch_side.initial, SMALL, 0))
    pytorch(pytorch_side.saved, SMALL, weights, tmp_path / "first")
    model = load(tmp_path / "first", "tensorflow", "cpu")
    assert isinstance(model, keras.Model) and model.backend == "tensorflow"
    assert model.config == SMALL
    save(model, tmp_path / "second")
    config, back = pytorch(pytorch_side.loaded, tmp_path / "second")
    assert config == SMALL
    assert_same(back, weights)


def test_predictions_of_any_number_of_images():
    model = build(SMALL.replace(score_threshold=0.0, max_detections=5), "tensorflow", device="cpu")
    assert predict(model, []) == []
    found = predict(model, [pictures(40, 30), pictures(64, 96), pictures(10, 100)])
    assert [x["boxes"].shape for x in found] == [(5, 4)] * 3
    assert {x["labels"].dtype for x in found} == {np.dtype(np.int64)}


def test_weights_of_another_network_are_refused():
    model = build(SMALL, "tensorflow", device="cpu")
    tensors = backend_tf.state(model)
    for wrong in (
        {name: x for name, x in tensors.items() if "bn1" not in name},
        tensors | {"more": np.zeros(1)},
        tensors | {"backbone.body.bn1.weight": np.zeros(1)},
    ):
        with pytest.raises(ValueError, match="weights are not those of this network"):
            backend_tf.load_state(model, wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ()}, "at least one class; got none"),
        (
            {"levels": (3, 4), "anchors": AnchorConfig((8, 16), (12.0, 24.0))},
            r"levels must be 3 to 5, 6 or 7; got \(3, 4\)",
        ),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build(SMALL.replace(**change), "tensorflow", device="cpu")


@pytest.mark.parametrize("device", ["abacus", "cpu:7", "cuda:99"])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used: TensorFlow has CPU:0"):
        build(SMALL, "tensorflow", device=device)


def test_the_record_of_a_run(pytorch):
    model = build(SMALL, "tensorflow", device="cpu")
    record = backend_tf.describe(model)
    assert record["device"].startswith("cpu (") and "threads" in record["device"]
    assert set(record["versions"]) == {"tensorflow", "keras", "python"}
    frozen = backend_tf.describe(build(SMALL.replace(norm="frozen_batch"), "tensorflow"))
    norms = sum(x.size for n, x in backend_tf.state(model).items() if ".bn1.weight" in n)
    assert record["parameters"] - frozen["parameters"] > 2 * norms
    _, expected = pytorch(pytorch_side.shapes, SMALL)
    assert record["parameters"] == expected


def test_a_model_that_goes_takes_its_graphs_along():
    gc.collect()
    gc.freeze()  # what other tests left is not looked at again
    try:
        model = build(SMALL, "tensorflow", device="cpu")
        images = pictures(1, 64, 96)
        backend_tf.detect(model, images, np.array([[64, 96]]))
        graph = model.raw_outputs.get_concrete_function(tf.constant(images)).graph
        gone = weakref.ref(model), weakref.ref(graph)
        del model, graph
        gc.collect()
    finally:
        gc.unfreeze()
    assert [ref() for ref in gone] == [None, None]


def test_keras_must_run_on_tensorflow(monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ImportError, match=r"set KERAS_BACKEND=tensorflow .*it runs on jax"):
        runpy.run_path(network_tensorflow.__file__)


def test_keras_settings_of_the_user_change_nothing():
    x = tf.cast(pictures(1, 64, 96), tf.float32) / 255
    config = SMALL.replace(head_norm="group")
    expected = build(config, "tensorflow", device="cpu")(x)
    own = keras.config
    before = own.floatx(), own.image_data_format(), own.dtype_policy()
    try:
        own.set_floatx("float64")
        own.set_image_data_format("channels_first")
        own.set_dtype_policy("mixed_float16")
        found = build(config, "tensorflow", device="cpu")(x)
        kept = own.floatx(), own.image_data_format(), own.dtype_policy().name
    finally:
        own.set_floatx(before[0])
        own.set_image_data_format(before[1])
        own.set_dtype_policy(before[2])
    assert kept == ("float64", "channels_first", "mixed_float16")
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == tf.float32
        np.testing.assert_array_equal(a, b)
