"""The TensorFlow RetinaNet: what it alone has; the rest is in tests/retinanet/test_network.py."""

import gc
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
pytest.importorskip("safetensors")

import pytorch_side  # noqa: E402
from detectors import assert_near, pictures  # noqa: E402

import focal  # noqa: E402
import focal.tensorflow as F  # noqa: E402
from focal.retinanet import RetinaNetConfig, TrainConfig, build, predict  # noqa: E402
from focal.retinanet.architecture import Backbone  # noqa: E402
from focal.retinanet.data.loader import Batch  # noqa: E402
from focal.retinanet.tensorflow import network as network_tensorflow  # noqa: E402
from focal.retinanet.tensorflow import trainer as backend_tf  # noqa: E402

SMALL = RetinaNetConfig(
    classes=("circle", "square", "triangle"),
    image_size=(64, 96),
    backbone="tiny",
    norm="batch",
    channels=16,
    head_depth=1,
)


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


def test_global_random_state_is_kept():
    def seed():
        keras.utils.clear_session()  # older versions keep their generator otherwise
        keras.utils.set_random_seed(5)

    def draws():
        return float(tf.random.normal(())), float(keras.random.normal(()))

    seed()
    expected = draws()
    seed()
    first, other = (backend_tf.state(build(SMALL, "tensorflow", s)) for s in (1, 2**40))
    assert draws() == expected
    name = "backbone.body.conv1.weight"
    assert (first[name] != other[name]).all()


def test_every_variable_is_in_the_weights_file():
    model = build(SMALL, "tensorflow", device="cpu")
    assert len(model.variables) == len(backend_tf.state(model))


@pytest.mark.parametrize("optimizer", ["sgd", "sgd without momentum", "adamw"])
def test_optimizers_are_pytorchs(pytorch, optimizer):
    """The same gradients of two variables in both frameworks."""
    run = TrainConfig(optimizer=optimizer.split()[0], weight_decay=0.1)
    if "without" in optimizer:
        run = run.replace(momentum=0.0)
    rng = np.random.default_rng(0)
    start = [rng.normal(size=s).astype(np.float32) for s in ((3, 4), (5,))]
    gradients = [[5 * rng.normal(size=x.shape) for x in start] for _ in range(6)]
    rates = (0.01, 0.02, 0.1, 0.001, 0.01, 0.01)
    *_, expected = pytorch(pytorch_side.optimize, run, start, gradients, rates)

    variables = [keras.Variable(x) for x in start]
    ours = backend_tf._optimizer(run)
    ours.build(variables)
    for of_a_step, rate in zip(gradients, rates, strict=True):
        ours.learning_rate.assign(rate)
        ours.apply([tf.constant(g, tf.float32) for g in of_a_step], variables)
    for variable, x in zip(variables, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), x, rtol=1e-5, atol=1e-5)


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="device 'cpu:7' cannot be used: TensorFlow has CPU:0"):
        build(SMALL, "tensorflow", device="cpu:7")


def test_a_model_that_goes_takes_its_graphs_along():
    gc.collect()
    gc.freeze()  # what other tests left is not looked at again
    try:
        model = build(SMALL, "tensorflow", device="cpu")
        images = pictures(1, (64, 96))
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
    x = tf.cast(pictures(1, (64, 96)), tf.float32) / 255
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


# Devices and precision

RUN = TrainConfig(batch_size=2, precision="float32")
PRECISIONS = ("float32", "bfloat16")


def small_batch():
    boxes, labels = np.full((2, 1, 4), (8, 8, 40, 40), np.float32), np.zeros((2, 1), np.int64)
    sizes = np.full((2, 2), 64)
    return Batch(pictures(2, (64, 96)), boxes, labels, sizes, np.ones(2), np.arange(2), sizes)


def tf32():
    return tf.config.experimental.tensor_float_32_execution_enabled()


@pytest.fixture(params=[True, False])
def switch(request):
    """Whether the user allows TF32."""
    tf.config.experimental.enable_tensor_float_32_execution(request.param)
    yield request.param
    tf.config.experimental.enable_tensor_float_32_execution(True)


def test_tf32_is_off_in_here_and_as_it_was_outside(switch):
    with backend_tf.FULL_FLOAT32:
        assert not tf32()
        with backend_tf.FULL_FLOAT32:
            assert not tf32()
        assert not tf32()
    assert tf32() == switch
    with pytest.raises(ZeroDivisionError), backend_tf.FULL_FLOAT32:
        raise ZeroDivisionError
    assert tf32() == switch


def test_tf32_stays_off_until_the_last_thread_has_left(switch):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with backend_tf.FULL_FLOAT32:
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with backend_tf.FULL_FLOAT32:  # leaves first, although it came first
        thread.start()
        assert inside.wait(60)
    assert not tf32()
    leave.set()
    thread.join()
    assert tf32() == switch


def test_what_is_asked_for_in_float32_runs_without_tf32(monkeypatch, switch):
    seen, normalized = [], backend_tf._normalized

    def looking(config, images):
        """A part of the graph that looks at the switch when it runs."""
        with tf.control_dependencies([tf.py_function(lambda: seen.append(tf32()), [], [])]):
            return normalized(config, images)

    monkeypatch.setattr(backend_tf, "_normalized", looking)
    model, batch = build(SMALL, "tensorflow", device="cpu"), small_batch()
    backend_tf.raw_outputs(model, batch.images)
    backend_tf.detect(model, batch.images, batch.sizes)
    predict(model, list(batch.images))
    assert seen == [False] * 3
    trainers = [backend_tf.Trainer(model, RUN.replace(precision=p)) for p in PRECISIONS]
    for trainer in trainers * 2:
        trainer.step(0, batch, 0.0)
    assert seen[3:] == [False, switch] * 2  # bfloat16 is the user's choice
    assert tf32() == switch


@pytest.mark.parametrize("precision", PRECISIONS)
def test_xla_computes_in_the_precision(precision):
    run = RUN.replace(precision=precision, compile=True)
    trainer = backend_tf.Trainer(build(SMALL, "tensorflow", device="cpu"), run)
    anchors = F.anchors(SMALL.image_size, SMALL.anchors)
    images, count = tf.zeros((2, 64, 96, 3), tf.uint8), len(anchors)
    target = tf.zeros((2, count), tf.int64), tf.zeros((2, count, 4))
    with backend_tf.FULL_FLOAT32:
        lower = trainer._gradient.experimental_get_compiler_ir
        text = lower(images, *target, anchors, tf.constant(1.0))(stage="hlo")
    found = [line for line in text.splitlines() if " convolution(" in line]
    kernels = [x for x in trainer.model.variables if len(x.shape) == 4]
    assert len(found) > 2 * len(kernels)  # those of the backward pass, too
    types = {x for line in found for x in re.findall(r"[( ]([a-z]+\d+)\[", line)}
    if precision == "float32":
        assert types == {"f32"}
        assert all("operand_precision={highest,highest}" in line for line in found)
    else:
        assert types == {"bf16"}


@pytest.mark.parametrize(
    ("details", "precision"),
    [
        ({}, "float32"),  # a CPU, or a GPU that is not NVIDIA's
        ({"compute_capability": (7, 0)}, "float32"),  # V100
        ({"compute_capability": (7, 5)}, "float32"),  # T4
        ({"compute_capability": (8, 0)}, "bfloat16"),
        ({"compute_capability": (9, 0)}, "bfloat16"),
        ({"compute_capability": (12, 0)}, "bfloat16"),
    ],
)
def test_auto_is_bfloat16_where_the_device_multiplies_it(monkeypatch, details, precision):
    monkeypatch.setattr(backend_tf, "_details", lambda place: details)
    model = build(SMALL, "tensorflow", device="cpu")
    assert backend_tf.Trainer(model, RUN.replace(precision="auto")).precision == precision


def test_details_are_those_of_the_gpu_behind_the_name(monkeypatch):
    """The first is split in two, as TensorFlow can be told to."""
    parts = {"V100": [object(), object()], "H100": None}
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: list(parts))
    monkeypatch.setattr(tf.config, "get_logical_device_configuration", parts.get)
    monkeypatch.setattr(
        tf.config.experimental, "get_device_details", lambda gpu: {"device_name": gpu}
    )
    names = [backend_tf._details(f"GPU:{index}")["device_name"] for index in range(3)]
    assert names == ["V100", "V100", "H100"]
    assert backend_tf._details("CPU:0") == {}


def test_all_is_on_the_device_that_is_named():
    script = """
        import numpy as np
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        parts = [tf.config.LogicalDeviceConfiguration() for _ in range(3)]
        tf.config.set_logical_device_configuration(cpu, parts)

        from focal.retinanet import PRESETS, TrainConfig, build
        from focal.retinanet.data.loader import Batch
        from focal.retinanet.tensorflow import trainer as ours

        def places(tensors):
            return {x.device.rpartition("/device:")[2] for x in tensors}

        config = PRESETS["tiny"].detector.replace(
            classes=("a",), image_size=(64, 64), channels=8, head_depth=1
        )
        run = TrainConfig(batch_size=2, precision="float32", optimizer="adamw", ema=0.9)
        images, sizes = np.zeros((2, 64, 64, 3), np.uint8), np.full((2, 2), 64)
        boxes, labels = np.full((2, 1, 4), (8, 8, 40, 40), np.float32), np.zeros((2, 1), np.int64)
        batch = Batch(images, boxes, labels, sizes, np.ones(2), np.arange(2), sizes)

        assert ours.replicas("cpu").count == 3
        assert ours.replicas("cpu:1").count == 1 and ours.replicas("cpu:1").handle is None
        for name in ("CPU:1", "cpu:0"):
            model = build(config, "tensorflow", device=name)
            assert places(v.value for v in model.variables) == {name.upper()}
            with tf.device(model.device):
                found = ours.detections_of(model, tf.constant(images), tf.constant(sizes))
                assert places((*model.raw_outputs(tf.constant(images)), *found)) == {name.upper()}
        model = build(config, "tensorflow", device="cpu:1")
        trainer = ours.Trainer(model, run, ours.replicas("cpu:1"))
        found = trainer.step(0, batch, 1e-3)
        trainer.load_state(trainer.state())
        found |= trainer.step(1, batch, 1e-3)
        kept = [*trainer.average.values(), trainer.mean_positives, trainer._healthy]
        kept += [v.value for v in (*model.variables, *trainer.optimizer.variables)]
        assert places((*found.values(), *kept)) == {"CPU:1"}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(Path(focal.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_one_device_cannot_be_that_of_several_processes(monkeypatch):
    workers = {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(workers))
    with pytest.raises(ValueError, match="'cpu:0' cannot be used by several processes: expected a"):
        backend_tf.replicas("cpu:0")
