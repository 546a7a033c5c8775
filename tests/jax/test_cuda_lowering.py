"""What JAX makes for CUDA, which it writes without a GPU: types, calls, shapes, precision."""

import re
from functools import partial
from itertools import product

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
pytest.importorskip("optax")

import jax.numpy as jnp  # noqa: E402
from detectors import CONFIG, pictures  # noqa: E402
from flax import nnx  # noqa: E402
from jax import export  # noqa: E402

import focal.jax as F  # noqa: E402
from focal.core.anchors import AnchorConfig  # noqa: E402
from focal.retinanet import TrainConfig, raw_outputs  # noqa: E402
from focal.retinanet.jax import trainer as ours  # noqa: E402

RUN = TrainConfig(batch_size=4, precision="float32", flips="none", workers=0)
R50 = CONFIG.replace(
    backbone="resnet50",
    norm="frozen_batch",
    levels=(3, 4, 5, 6, 7),
    anchors=AnchorConfig(),
)


def for_cuda(function, *arguments):
    """The module that CUDA would get, in which no float64, callback or dynamic shape may be."""
    text = export.export(function, platforms=["cuda"])(*arguments).mlir_module()
    text = re.sub(r"loc\(.*|dense<[^>]*>", "", text)  # places in files, and constants in hex
    assert "f64" not in text
    assert "callback" not in text
    assert "x?" not in text and "<?" not in text
    return text


def test_what_may_not_be_is_found():
    def asks_the_host(x):
        return jax.pure_callback(np.sin, x, x)

    with jax.enable_x64(True), pytest.raises(AssertionError, match="f64"):
        for_cuda(jax.jit(jnp.sin), np.zeros(3))
    # Without a GPU, JAX does not even lower it.
    with pytest.raises((AssertionError, ValueError), match=r"callback|lowering platform"):
        for_cuda(jax.jit(asks_the_host), np.zeros(3, np.float32))
    with pytest.raises(AssertionError, match=r"x\?"):
        any_number = export.symbolic_shape("n, 3")
        for_cuda(jax.jit(jnp.sin), jax.ShapeDtypeStruct(any_number, np.float32))


X = jax.ShapeDtypeStruct((6, 3), jnp.float32)
LABELS = jax.ShapeDtypeStruct((6,), jnp.int32)
SCORES = jax.ShapeDtypeStruct((6,), jnp.float32)
BOXES = jax.ShapeDtypeStruct((6, 4), jnp.float32)
LISTS = jax.ShapeDtypeStruct((2, 6, 4), jnp.float32)
ANCHORS = jax.ShapeDtypeStruct((200, 4), jnp.float32)
LOSSES = {
    "sigmoid_focal_loss": (X, X),
    "sigmoid_focal_loss_star": (X, X),
    "balanced_cross_entropy": (X, X),
    "quality_focal_loss": (X, X),
    "varifocal_loss": (X, X),
    "heatmap_focal_loss": (X, X),
    "asymmetric_loss": (X, X),
    "sparse_sigmoid_focal_loss": (X, LABELS),
    "softmax_focal_loss": (X, LABELS),
    "smooth_l1_loss": (X, X),
    "giou_loss": (BOXES, BOXES),
}
OTHERS = {
    "box_area": (F.box_area, BOXES),
    "box_iou": (F.box_iou, BOXES, ANCHORS),
    "generalized_box_iou": (F.generalized_box_iou, BOXES, ANCHORS),
    "encode_boxes": (F.encode_boxes, BOXES, BOXES),
    "decode_boxes": (F.decode_boxes, BOXES, BOXES),
    "clip_boxes": (partial(F.clip_boxes, image_size=(64, 64)), BOXES),
    "nms": (partial(F.nms, iou_threshold=0.5), BOXES, SCORES),
    "batched_nms": (partial(F.batched_nms, iou_threshold=0.5), BOXES, SCORES, LABELS),
    "anchors": (lambda: F.anchors((64, 64)),),
    "match_anchors": (partial(F.match_anchors, allow_low_quality=True), ANCHORS, BOXES),
    "assign_targets": (F.assign_targets, ANCHORS, BOXES, LABELS),
    "subsample": (lambda labels, x: F.subsample(labels, 4, noise=x), LABELS, SCORES),
    "hard_example_mask": (
        lambda x, boxes: F.hard_example_mask(x, 4, boxes=boxes, iou_threshold=0.5),
        SCORES,
        BOXES,
    ),
    "num_positives": (F.num_positives, LABELS),
    "prior_bias_init": (lambda: F.prior_bias_init(0.01)(None, (3,), jnp.float32),),
}
CASES = OTHERS | {
    "clip_boxes, gradient": (jax.grad(lambda x: F.clip_boxes(x, (64, 64)).sum()), BOXES),
    "clip_boxes, bfloat16": (OTHERS["clip_boxes"][0], BOXES.update(dtype=jnp.bfloat16)),
    "clip_boxes, int32": (OTHERS["clip_boxes"][0], BOXES.update(dtype=jnp.int32)),
    "assign_targets, batch": (F.assign_targets, ANCHORS, LISTS, LABELS.update(shape=(2, 6))),
}
NUMBERS = {"AnchorConfig", "expected_initial_loss", "inverse_frequency_alpha", "prior_bias"}
"""What takes and gives no arrays of JAX."""


def test_no_function_is_forgotten():
    assert LOSSES.keys() | OTHERS.keys() | NUMBERS == set(F.__all__)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_derivatives(name, dtype):
    def total(x, y):
        return getattr(F, name)(x, y, reduction="sum")

    x, y = LOSSES[name]
    x = jax.ShapeDtypeStruct(x.shape, dtype)
    for_cuda(jax.jit(jax.value_and_grad(total)), x, y)
    for_cuda(jax.jit(jax.grad(lambda x, y: jax.grad(total)(x, y).sum())), x, y)


@pytest.mark.parametrize("name", CASES)
def test_a_function(name):
    function, *arguments = CASES[name]
    text = for_cuda(jax.jit(function), *arguments)
    assert not re.search(r"\bi64>|custom_call", text)  # which would be slow


def convolutions(text):
    """The precisions and types of operands that occur, such as "HIGHEST f32", and how often."""
    assert "stablehlo.dot" not in text
    lines = [line for line in text.splitlines() if "stablehlo.convolution(" in line]
    kinds = set()
    for line in lines:
        operands = line.rpartition(" : ")[2].partition("->")[0]
        precisions = re.findall(r"#stablehlo<precision (\w+)>", line) or ["DEFAULT"]
        kinds |= {" ".join(x) for x in product(precisions, re.findall(r"x([a-z]+\d+)>", operands))}
    return kinds, len(lines)


def batch_of(config):
    height, width = config.image_size
    boxes = np.array([[[4, 4, 30, 40], [10, 20, 50, 60]]] * 4, np.float32)
    labels = np.array([[0, -1]] * 4)
    return pictures(4, (height, width)), boxes, labels


@pytest.mark.parametrize(
    ("config", "run"),
    [
        (CONFIG, RUN),
        (R50, RUN.replace(precision="bfloat16")),
        (
            CONFIG.replace(norm="group", head_norm="group", box_loss="giou"),
            RUN.replace(clip_norm=0.1),
        ),
        (CONFIG.replace(loss="ohem", gamma=0.0), RUN.replace(precision="bfloat16")),
        (CONFIG, RUN.replace(accumulate=2, recompute=True, optimizer="adamw", ema=0.9)),
    ],
    ids=["tiny", "resnet50-bfloat16", "group-giou", "ohem-bfloat16", "accumulate-recompute"],
)
def test_a_step(config, run):
    trainer = ours.Trainer(ours.build(config, 0, "cpu"), run)
    text = for_cuda(ours._train_step, *trainer.static, 1, trainer.run, *batch_of(config), 0.01, 0.9)
    kinds, count = convolutions(text)
    layers = [m for _, m in nnx.iter_graph(trainer.model) if isinstance(m, nnx.Conv)]
    assert count > 2 * len(layers)  # those of the backward pass, too
    assert kinds == {"DEFAULT bf16" if run.precision == "bfloat16" else "HIGHEST f32"}


@pytest.mark.parametrize("config", [CONFIG, R50], ids=["tiny", "resnet50"])
def test_inference(config):
    model = ours.build(config, 0, "cpu")
    images, sizes = pictures(2, config.image_size), np.array([config.image_size] * 2)
    text = for_cuda(ours._detections, *nnx.split(model), images, sizes)
    assert convolutions(text)[0] == {"HIGHEST f32"}


def test_precision_that_the_user_sets_for_others_is_not_ours():
    model = ours.build(CONFIG, 0, "cpu")
    expected = raw_outputs(model, pictures(1, (64, 64)))
    with jax.default_matmul_precision("bfloat16"):
        text = for_cuda(ours._raw_outputs, *nnx.split(model), pictures(2, (64, 64)))
        found = raw_outputs(model, pictures(1, (64, 64)))
    assert convolutions(text)[0] == {"HIGHEST f32"}
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.config.jax_default_matmul_precision is None
