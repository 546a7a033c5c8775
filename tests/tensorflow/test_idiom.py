"""What TensorFlow users do with a loss: tapes, graphs, XLA, half types, Keras models."""

import logging
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")

import focal.keras  # noqa: E402
import focal.numpy as reference  # noqa: E402
import focal.tensorflow as F  # noqa: E402

GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.7]
EXTREMES = [-1000.0, -100.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 100.0, 1000.0]
REDUCTIONS = ["none", "mean", "sum"]


def logits(*shape, dtype="float32", scale=3.0):
    return tf.constant(np.random.default_rng(0).normal(scale=scale, size=shape), dtype)


def soft(*shape, dtype="float32"):
    return tf.constant(np.random.default_rng(1).random(shape), dtype)


def gradient(function, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = function(x)
    return tape.gradient(loss, x)


def orders(function, x):
    """The value, the gradient and the gradient of its sum, at the cost of one call."""
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            value = function(x)
        slope = inner.gradient(value, x)
    return value, slope, outer.gradient(slope, x)


def second(function, x):
    """The diagonal of the Hessian of an elementwise function."""
    return orders(function, x)[2]


def close(got, expected, rtol=1e-6, atol=0.0):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=rtol, atol=atol)


def every_loss(gamma, reduction):
    """One function of the logits (6, 3) for each loss."""
    y, labels = soft(6, 3), tf.constant([0, 1, -1, -2, 2, 0])
    chosen = tf.constant([0, 1, 2, -100, 2, 0])
    return {
        "dense": lambda x: F.sigmoid_focal_loss(x, y, 0.25, gamma, reduction),
        "sparse": lambda x: F.sparse_sigmoid_focal_loss(x, labels, 0.25, gamma, reduction),
        "softmax": lambda x: F.softmax_focal_loss(x, chosen, [1, 2, 3], gamma, reduction),
        "star": lambda x: F.sigmoid_focal_loss_star(x, y, 0.25, gamma + 1, 1.0, reduction),
        "balanced": lambda x: F.balanced_cross_entropy(x, y, 0.75, reduction),
    }


def relatives(gamma, reduction):
    """The same for what is rarer."""
    y, labels = soft(6, 3), tf.constant([0, 1, -1, -2, 2, 0])
    chosen = tf.constant([0, 1, 2, -100, 2, 0])
    return {
        "quality": lambda x: F.quality_focal_loss(x, y, gamma, reduction),
        "varifocal": lambda x: F.varifocal_loss(x, y, 0.75, gamma, reduction),
        "heatmap": lambda x: F.heatmap_focal_loss(x, y, gamma, 4.0, reduction),
        "asymmetric": lambda x: F.asymmetric_loss(x, y, 1.0, gamma, 0.05, reduction),
        "per class": lambda x: F.sparse_sigmoid_focal_loss(
            x, labels, [0.1, 0.5, 0.9], gamma, reduction, label_smoothing=0.1
        ),
        "smoothed": lambda x: F.softmax_focal_loss(
            x, chosen, [1, 2, 3], gamma, reduction, label_smoothing=0.1
        ),
    }


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tape_once_and_twice_is_the_closed_form(gamma, dtype):
    x = tf.constant([*EXTREMES, 0.5, -2.0] * 2, dtype)
    y = tf.constant([0.0] * 11 + [1.0] * 11, dtype)
    wide = x.numpy().astype(float), y.numpy().astype(float), 0.25, gamma
    _, slope, bend = orders(lambda x: F.sigmoid_focal_loss(x, y, 0.25, gamma), x)
    single = dtype == "float32"
    rtol, tiny = (2e-6, 1.2e-38) if single else (1e-13, 1e-300)
    assert slope.dtype == bend.dtype == x.dtype
    exact = reference.sigmoid_focal_loss_grad(*wide), reference.sigmoid_focal_loss_hess(*wide)
    close(slope, exact[0], rtol, tiny)
    close(bend, exact[1], rtol, tiny)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("name", [*every_loss(2.0, "none"), *relatives(2.0, "none")])
def test_derivatives_at_extremes_are_finite(name, gamma):
    x = tf.constant(EXTREMES * 2, shape=(6, 3))
    for reduction in REDUCTIONS:
        loss = {**every_loss(gamma, reduction), **relatives(gamma, reduction)}[name]
        assert all(np.isfinite(a).all() for a in orders(loss, x))


def test_zero_is_no_kink():
    x = tf.zeros(2, tf.float64)
    y = tf.constant([0.0, 1.0], tf.float64)
    for gamma in GAMMAS:
        slope = gradient(lambda x, g=gamma: F.sigmoid_focal_loss(x, y, None, g), x)
        near = gradient(lambda x, g=gamma: F.sigmoid_focal_loss(x, y, None, g), x + 1e-9)
        close(slope, near, 1e-8)
        assert (np.abs(slope) > 0).all()


def test_third_derivative_at_zero_is_right():
    x, y, h = tf.zeros(1, tf.float64), tf.ones(1, tf.float64), 1e-4
    third = gradient(lambda x: second(lambda x: F.sigmoid_focal_loss(x, y, None), x), x)
    around = reference.sigmoid_focal_loss_hess(np.array([-h, h]), np.ones(2), None)
    close(third, [(around[1] - around[0]) / (2 * h)], 1e-6)


def test_mixed_and_target_derivatives():
    x, y, h = logits(6, dtype="float64"), 0.1 + 0.8 * soft(6, dtype="float64"), 1e-6
    by_y = gradient(lambda y: F.sigmoid_focal_loss(x, y), y)
    up, down = (F.sigmoid_focal_loss(x, y + s * h) for s in (1, -1))
    close(by_y, (up - down) / (2 * h), 1e-7)

    def slope(y):
        return gradient(lambda x: F.sigmoid_focal_loss(x, y), x)

    mixed = gradient(slope, y)
    close(mixed, (slope(y + h) - slope(y - h)) / (2 * h), 1e-6)
    close(gradient(lambda x: gradient(lambda y: F.sigmoid_focal_loss(x, y), y), x), mixed, 1e-12)


def test_jacobian_and_hessian_of_a_tape():
    x, y = logits(5, dtype="float64"), soft(5, dtype="float64")
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            loss = F.sigmoid_focal_loss(x, y, reduction="sum")
        slope = inner.gradient(loss, x)
    bend = reference.sigmoid_focal_loss_hess(x.numpy(), y.numpy())
    close(outer.jacobian(slope, x), np.diag(bend), 1e-12)


def test_stable_primitives_differentiate_twice():
    from focal.tensorflow import _ops

    x = tf.constant([-700.0, -30.0, -1.0, 0.0, 2.0, 30.0, 700.0], tf.float64)
    p, q = 1 / (1 + np.exp(-x.numpy())), 1 / (1 + np.exp(x.numpy()))
    expected = [np.logaddexp(0, x), p, p * q, p * q * (q - p)]
    for order in (0, 1, 2):
        derivative = (lambda f, x: f(x), gradient, second)[order]
        close(derivative(_ops.softplus, x), expected[order], 1e-14)
        close(derivative(_ops.sigmoid, x), expected[order + 1], 1e-14)


def test_equal_values_share_the_gradient():
    from focal.tensorflow import _ops

    x, y = tf.constant([[1.0, 2.0, 3.0]] * 2), tf.constant([1.0, 5.0, 0.0])
    for function, by_x in ((_ops.maximum, [0.5, 0, 1]), (_ops.minimum, [0.5, 1, 0])):
        with tf.GradientTape() as tape:
            tape.watch([x, y])
            result = function(x, y)
        got = tape.gradient(result, [x, y])
        close(got[0], [by_x] * 2)
        close(got[1], 2 * (1 - np.array(by_x)))


def test_giou_of_a_box_with_itself_pulls_both_alike():
    a = tf.constant([[0.0, 0.0, 2.0, 2.0]])
    by_first = gradient(lambda x: F.giou_loss(x, a), a)
    by_second = gradient(lambda x: F.giou_loss(a, x), a)
    close(by_first, by_second)


# ---------------------------------------------------------------- graphs


def test_autograph_converts_the_functions_without_a_warning():
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    x = tf.constant(EXTREMES * 2, shape=(6, 3))
    tf.get_logger().addHandler(handler)
    try:
        tf.function(lambda x: [loss(x) for loss in every_loss(1.5, "sum").values()])(x)
        boxes, scores = tf.constant([[0.0, 0.0, 2.0, 2.0]]), tf.constant([1.0])
        tf.function(lambda b, s: F.nms(b, s, 0.5))(boxes, scores)
        tf.function(lambda b: F.match_anchors(b, b, 0.5, 0.4))(boxes)
    finally:
        tf.get_logger().removeHandler(handler)
    assert not [m for m in messages if "AutoGraph" in m]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.7])
def test_graphs_equal_eager(gamma):
    """One graph of all losses, with their gradients, and for most the diagonal of the Hessian."""
    x = tf.constant(EXTREMES * 2, shape=(6, 3))
    reductions = REDUCTIONS if gamma == 0.5 else ("none", "sum")  # compiling takes long
    losses = {(r, k): f for r in reductions for k, f in every_loss(gamma, r).items()}
    rarer = relatives(gamma, "sum") if gamma == 0.5 else {}

    def everything(x):
        results = {name: orders(loss, x) for name, loss in losses.items()}
        return results | {("sum", k): (f(x), gradient(f, x)) for k, f in rarer.items()}

    eager = everything(x)
    for jit_compile in (False, True):
        traced = tf.function(everything, jit_compile=jit_compile)(x)
        for name in eager:
            for order, (a, b) in enumerate(zip(eager[name], traced[name], strict=True)):
                # XLA rounds p - p^2 of a certain class at one unit in the last place of p = 1.
                rounded = jit_compile and order == 2 and name[1] == "softmax"
                close(b, a, 2e-5, 4e-7 if rounded else 1e-36)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_mean_of_an_unknown_batch(jit_compile):
    x, y, labels = logits(7, 3), soft(7, 3), tf.constant([0, 1, -1, -2, 2, 0, 1])
    chosen = tf.maximum(labels, 0)
    rows, one = tf.TensorSpec((None, 3)), tf.TensorSpec((None,), tf.int32)

    def all_of_them(x, y, labels, chosen):
        return (
            F.sigmoid_focal_loss(x, y, reduction="mean", weight=tf.ones((7, 1))),
            F.sigmoid_focal_loss(x, y, reduction="mean"),
            F.sparse_sigmoid_focal_loss(x, labels, reduction="mean"),
            F.sparse_sigmoid_focal_loss(x, labels, reduction="positives"),
            F.softmax_focal_loss(x, chosen, [1, 2, 3], reduction="mean"),
            F.smooth_l1_loss(x, y, reduction="mean"),
            F.giou_loss(tf.concat([y[:, :2], 1 + y[:, :2]], 1), tf.zeros((7, 4)), "mean"),
            gradient(lambda x: F.sigmoid_focal_loss(x, y, reduction="mean"), x),
        )

    signature = [rows, rows, one, one]
    traced = tf.function(all_of_them, input_signature=signature, jit_compile=jit_compile)
    arguments = x, y, labels, chosen
    for a, b in zip(all_of_them(*arguments), traced(*arguments), strict=True):
        close(b, a, 1e-5)
    empty = F.sigmoid_focal_loss, F.smooth_l1_loss
    for function in empty:
        mean = tf.function(lambda x, f=function: f(x, x, reduction="mean"), input_signature=[rows])
        assert mean(tf.zeros((0, 3))) == 0


def test_softmax_of_images_of_unknown_size():
    x, labels = logits(2, 4, 5, 3), tf.constant(np.random.default_rng(2).integers(0, 3, (2, 4, 5)))
    loss = tf.function(
        lambda x, t: F.softmax_focal_loss(x, t, [1.0, 2.0, 3.0]),
        input_signature=[tf.TensorSpec((None, None, None, 3)), tf.TensorSpec([None] * 3, tf.int64)],
    )
    close(loss(x, labels), F.softmax_focal_loss(x, labels, [1.0, 2.0, 3.0]))


def test_shapes_known_to_differ_still_raise_while_tracing():
    with pytest.raises(ValueError, match=r"got inputs \(None, 3\), targets \(None, 4\)"):
        tf.function(F.sigmoid_focal_loss).get_concrete_function(
            tf.TensorSpec((None, 3)), tf.TensorSpec((None, 4))
        )


def scene(count):
    random = np.random.default_rng(3)
    corner, side = random.uniform(0, 48, (2, count, 2)), random.uniform(8, 40, (2, count, 2))
    boxes = np.concatenate([corner, corner + side], -1).astype(np.float32)
    return boxes, random.integers(0, 5, (2, count))


@pytest.mark.parametrize("count", [0, 1, 12])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_targets_for_an_unknown_number_of_boxes(count, jit_compile):
    config = F.AnchorConfig(strides=(8, 16), sizes=(16, 32))
    anchors = F.anchors((64, 64), config)
    boxes, labels = scene(count)
    expected = reference.assign_targets(anchors.numpy(), boxes, labels, 0.5, 0.4, True)
    for shape in ((None, None, 4), (2, count, 4)):
        signature = [tf.TensorSpec(shape), tf.TensorSpec(shape[:-1], tf.int64)]
        assign = tf.function(
            lambda b, t: F.assign_targets(anchors, b, t, allow_low_quality=True),
            input_signature=signature,
            jit_compile=jit_compile,
        )
        assigned, deltas = assign(boxes, labels)
        np.testing.assert_array_equal(assigned, expected[0])
        close(deltas, expected[1], 1e-4, 1e-5)


@pytest.mark.parametrize("traced", [False, True])
def test_nms_is_that_of_numpy(traced):
    random = np.random.default_rng(4)
    corner, side = random.uniform(0, 100, (600, 2)), random.uniform(10, 60, (600, 2))
    boxes = np.concatenate([corner, corner + side], -1).astype(np.float32)
    scores = (random.integers(0, 99, 600) / 99).astype(np.float32)
    classes = random.integers(0, 3, 600)
    nms, batched = (tf.function(f) if traced else f for f in (F.nms, F.batched_nms))
    for threshold in (0.3, 0.7):
        expected = reference.nms(boxes, scores, threshold)
        np.testing.assert_array_equal(nms(boxes, scores, threshold), expected)
        expected = reference.batched_nms(boxes, scores, classes, threshold)
        np.testing.assert_array_equal(batched(boxes, scores, classes, threshold), expected)


def test_nms_needs_a_known_number_of_boxes():
    with pytest.raises(ValueError, match="the number of boxes must be known"):
        tf.function(F.nms).get_concrete_function(
            tf.TensorSpec((None, 4)), tf.TensorSpec((None,)), 0.5
        )


def test_a_training_step_is_traced_once():
    layer = tf.Variable(tf.zeros((4, 3)))
    traces = []

    @tf.function
    def step(x, labels):
        traces.append(1)
        with tf.GradientTape() as tape:
            loss = F.sparse_sigmoid_focal_loss(x @ layer, labels, reduction="positives")
        layer.assign_sub(0.1 * tape.gradient(loss, layer))
        return loss

    x, labels = logits(8, 4), tf.constant([0, 1, 2, -1, -1, -2, 0, 1])
    seen = [float(step(x, labels)) for _ in range(5)]
    assert len(traces) == 1
    assert seen == sorted(seen, reverse=True)


def loss_and_gradient(x, y):
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = F.sigmoid_focal_loss(x, y, reduction="sum")
    return loss, tape.gradient(loss, x)


def test_a_graph_asks_for_xla_where_shapes_are_known():
    """On the operations: a call of a function is more than some readers of a graph can do."""
    for rows, asked in ((6, True), (None, False)):
        spec = tf.TensorSpec((rows, 3))
        graph = tf.function(loss_and_gradient).get_concrete_function(spec, spec).graph
        kinds = [op.type for op in graph.get_operations()]
        marked = [op.type for op in graph.get_operations() if "_XlaCompile" in op.node_def.attr]
        assert marked.count("Exp") == kinds.count("Exp") * asked
        assert not [kind for kind in kinds if kind.endswith("Call")]


# ---------------------------------------------------------------- types


def test_what_converts_to_a_tensor_is_taken():
    expected = F.sigmoid_focal_loss(tf.constant([1.0, -2.0]), tf.constant([1.0, 0.0]))
    for x in (tf.Variable([1.0, -2.0]), np.float32([1, -2]), [1.0, -2.0]):
        close(F.sigmoid_focal_loss(x, [1, 0]), expected)
    with pytest.raises(TypeError, match=r"inputs must be a tf\.Tensor or what converts to one"):
        F.sigmoid_focal_loss([[1.0], [1.0, 2.0]], [1, 0])
    with pytest.raises(TypeError, match="got KerasTensor"):
        F.sigmoid_focal_loss(keras.Input((3,)), [1, 0])


def test_gradient_reaches_a_variable():
    x = tf.Variable([1.0, -2.0])
    with tf.GradientTape() as tape:
        loss = F.sigmoid_focal_loss(x, [1.0, 0.0], reduction="sum")
    close(tape.gradient(loss, x), reference.sigmoid_focal_loss_grad(x.numpy(), [1.0, 0.0]))


def test_nan_does_not_disturb_the_order():
    from focal.tensorflow import _ops

    order = _ops.argsort(tf.constant([2.0, np.nan, 1.0, np.inf, 1.0]))
    np.testing.assert_array_equal(order, [2, 4, 0, 3, 1])


# ---------------------------------------------------------------- Keras


# tests/keras has what holds on every backend of Keras.


def test_the_names_for_keras_are_those_of_focal_keras():
    for name in ("PriorBias", "SigmoidFocalLoss", "SoftmaxFocalLoss", "SparseSigmoidFocalLoss"):
        assert getattr(F, name) is getattr(focal.keras, name)


READER = """
import sys
sys.modules["focal"] = None  # cannot be imported
import keras, numpy as np, tensorflow as tf

folder, x = sys.argv[1], np.eye(4, dtype=np.float32)
served = tf.saved_model.load(folder + "/exported")
logits, targets = -3 * x, np.eye(4, dtype=np.float32)
loss, slope = tf.saved_model.load(folder + "/step").step(logits, targets)
for options in ({}, {"compile": False}):
    try:
        keras.models.load_model(folder + "/model.keras", **options)
    except TypeError:
        pass
    else:
        raise AssertionError("read without focal")
del sys.modules["focal"]
import focal.tensorflow
again = keras.models.load_model(folder + "/model.keras")
assert isinstance(again.loss, focal.tensorflow.SigmoidFocalLoss)
np.testing.assert_allclose(served.serve(x), again.predict(x, verbose=0), rtol=1e-5)
terms = focal.tensorflow.sigmoid_focal_loss(logits, targets)
np.testing.assert_allclose(loss, terms.numpy().sum(), rtol=1e-6)
np.testing.assert_array_less(slope * (2 * targets - 1), 0)
"""
WITHOUT_XLA = {"TF_XLA_FLAGS": "--tf_xla_clustering_fuel=0"}


def test_who_reads_a_model_needs_focal_and_who_reads_an_export_does_not(tmp_path):
    network = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, bias_initializer=F.PriorBias(0.01))]
    )
    network.compile("sgd", loss=F.SigmoidFocalLoss())
    network.save(tmp_path / "model.keras")
    network.export(tmp_path / "exported", verbose=False)
    step = tf.Module()
    step.step = tf.function(loss_and_gradient, input_signature=[tf.TensorSpec((4, 4))] * 2)
    tf.saved_model.save(step, tmp_path / "step")
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path)],
        env={**os.environ, **WITHOUT_XLA},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- boxes in graphs


@pytest.mark.parametrize("jit_compile", [False, True])
def test_subsample_of_an_unknown_number_of_anchors(jit_compile):
    draw = tf.function(
        lambda labels: F.subsample(labels, 8),
        input_signature=[tf.TensorSpec((None, None), tf.int64)],
        jit_compile=jit_compile,
    )
    for shape in ((2, 60), (3, 40)):
        labels = np.random.default_rng(0).integers(-1, 1, shape)
        samples = [draw(labels).numpy() for _ in range(3)]
        for sample in samples:
            np.testing.assert_array_equal((sample > -2).sum(-1), 8)
            np.testing.assert_array_equal((sample == 0).sum(-1), 2)
            np.testing.assert_array_equal(sample[sample > -2], labels[sample > -2])
        assert (samples[0] != samples[1]).any() and (samples[1] != samples[2]).any()


def test_a_seed_of_tensorflow_repeats_the_sample():
    labels = tf.zeros(200, tf.int64)

    def sample():
        tf.random.set_seed(3)
        return F.subsample(labels, 20, 1.0).numpy()

    np.testing.assert_array_equal(sample(), sample())
    tf.random.set_seed(4)
    assert (F.subsample(labels, 20, 1.0).numpy() != sample()).any()


@pytest.mark.parametrize("jit_compile", [False, True])
def test_kinks_in_graphs_and_twice(jit_compile):
    zero, two = tf.zeros(3, tf.float64), tf.constant([[0.0, 0.0, 2.0, 2.0]], tf.float64)
    touching = tf.constant([[2.0, 1.0, 4.0, 3.0]], tf.float64)
    for function, x, first in (
        (lambda x: F.smooth_l1_loss(x, zero, 0.0), zero, zero),
        (lambda x: F.clip_boxes(x, (2, 2)), two, np.ones((1, 4))),
        (lambda x: F.box_iou(x, touching), two, [[0, 0, 1 / 8, 0]]),
        (lambda x: F.giou_loss(x, two), two, np.zeros((1, 4))),
    ):
        _, slope, bend = tf.function(partial(orders, function), jit_compile=jit_compile)(x)
        np.testing.assert_array_equal(slope, first)
        # A constant slope has none, which a tape gives as None.
        assert bend is None or np.isfinite(bend).all()
