"""The TensorFlow RetinaNet: what it alone has; the rest is in tests/retinanet/test_network.py."""

import gc
import runpy
import weakref

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
pytest.importorskip("safetensors")

import pytorch_side  # noqa: E402
from detectors import assert_near, pictures  # noqa: E402

from focal.retinanet import RetinaNetConfig, TrainConfig, build  # noqa: E402
from focal.retinanet.architecture import Backbone  # noqa: E402
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
