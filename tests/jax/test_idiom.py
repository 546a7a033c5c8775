"""What JAX users do with a loss: transformations, 64 bits, strict types, sharding, training."""

import math
import os
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

import focal.jax as F  # noqa: E402
import focal.numpy as reference  # noqa: E402
from focal.core.nms import suppress  # noqa: E402
from focal.jax._namespace import xp  # noqa: E402

GAMMAS = [0.0, 0.5, 1.0, 2.0, 3.7]
EXTREMES = [-1000.0, -100.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 100.0, 1000.0]
LABELS = np.array([0, 2, -1, -2, 1, 0])


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("strict"):
        yield


def logits(*shape: int, dtype: str = "float32") -> np.ndarray:
    return (3 * np.random.default_rng(0).standard_normal(shape)).astype(dtype)


def soft(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(1).random(shape).astype(dtype)


def proper_boxes(*shape: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    corner, side = random.uniform(0, 60, (*shape, 2)), random.uniform(8, 40, (*shape, 2))
    return np.concatenate([corner, corner + side], axis=-1).astype(np.float32)


def crowd(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and scores, of which some are equal."""
    scores = np.random.default_rng(seed).integers(0, n, n) if n else np.zeros(0)
    return proper_boxes(n, seed=seed), scores.astype(np.float32)


def every_loss(x, labels=LABELS):
    """One number from all losses; x is (6, 3)."""
    y = jnp.asarray(soft(6, 3), x.dtype)
    return (
        F.sigmoid_focal_loss(x, y, reduction="sum")
        + F.sigmoid_focal_loss_star(x, y, reduction="mean")
        + F.balanced_cross_entropy(x, y, weight=y, reduction="sum")
        + F.sparse_sigmoid_focal_loss(x, labels, reduction="positives")
        + F.sparse_sigmoid_focal_loss(x, labels, gamma=0.5, reduction="mean")
        + F.softmax_focal_loss(
            x,
            labels - (labels == -1).astype(labels.dtype),
            [1, 2, 3],
            reduction="mean",
            ignore_index=-2,
        )
        + F.smooth_l1_loss(x, y, 0.1, reduction="mean")
    )


def relatives(x, labels=LABELS):
    """The same for what is rarer."""
    y = jnp.asarray(soft(6, 3), x.dtype)
    return (
        F.quality_focal_loss(x, y, reduction="sum")
        + F.varifocal_loss(x, y, reduction="sum")
        + F.heatmap_focal_loss(x, y, reduction="positives")
        + F.asymmetric_loss(x, y, reduction="sum")
        + F.sigmoid_focal_loss(x, y, [0.1, 0.5, 0.9], reduction="sum", label_smoothing=0.1)
        + F.sparse_sigmoid_focal_loss(
            x, labels, [0.1, 0.5, 0.9], reduction="sum", label_smoothing=0.1
        )
        + F.softmax_focal_loss(
            x,
            labels - (labels == -1).astype(labels.dtype),
            [1, 2, 3],
            reduction="sum",
            ignore_index=-2,
            label_smoothing=0.1,
        )
    )


@pytest.mark.parametrize("gamma", GAMMAS)
def test_transformations_agree_with_the_closed_forms(gamma):
    with jax.enable_x64(True):
        x, y = np.array(EXTREMES * 3), np.repeat([0.0, 0.3, 1.0], len(EXTREMES))
        value = reference.sigmoid_focal_loss(x, y, 0.25, gamma)
        slope = reference.sigmoid_focal_loss_grad(x, y, 0.25, gamma)
        bend = reference.sigmoid_focal_loss_hess(x, y, 0.25, gamma)
        close = {"rtol": 1e-12, "atol": 1e-300}

        def each(x):
            return F.sigmoid_focal_loss(x, y, 0.25, gamma)

        def total(x):
            return F.sigmoid_focal_loss(x, y, 0.25, gamma, "sum")

        def one(x, y):
            return F.sigmoid_focal_loss(x, y, 0.25, gamma, "mean")

        assert_allclose(jax.jit(each)(x), value, **close)
        assert_allclose(jax.grad(total)(x), slope, **close)
        assert_allclose(jax.jit(jax.value_and_grad(total))(x)[1], slope, **close)
        assert_allclose(jax.jvp(each, (x,), (np.ones_like(x),))[1], slope, **close)
        assert_allclose(jax.vmap(jax.grad(one))(x, y), slope, **close)
        assert_allclose(jax.jacrev(each)(x), np.diag(slope), **close)
        assert_allclose(jax.jit(jax.hessian(total))(x), np.diag(bend), rtol=1e-10, atol=1e-300)
        assert_allclose(jax.jacfwd(jax.jacrev(total))(x), np.diag(bend), rtol=1e-10, atol=1e-300)
        assert_allclose(jax.jacrev(jax.jacfwd(total))(x), np.diag(bend), rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("losses", [every_loss, relatives])
def test_numeric_derivatives_of_every_loss(losses):
    from jax.test_util import check_grads

    with jax.enable_x64(True):
        x = jnp.asarray(logits(6, 3), float)
        check_grads(jax.jit(losses), (x,), 2, ["fwd", "rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gradients_at_extremes_are_finite(gamma, dtype):
    x = jnp.asarray(np.repeat(EXTREMES, 3), dtype)
    y = jnp.asarray([0.0, 0.5, 1.0] * len(EXTREMES), dtype)
    for loss in (
        lambda x: F.sigmoid_focal_loss(x, y, 0.25, gamma, "sum"),
        lambda x: F.sigmoid_focal_loss_star(x, y, 0.25, gamma + 0.1, 1.0, "sum"),
        lambda x: F.softmax_focal_loss(x.reshape(9, 3), jnp.zeros(9, int), None, gamma, "sum"),
    ):
        value, slope = jax.value_and_grad(loss)(x)
        assert value.dtype == jnp.float32 and slope.dtype == dtype
        assert np.isfinite(value) and np.isfinite(slope.astype("float32")).all()
        bend = jax.jvp(jax.grad(loss), (x,), (jnp.ones_like(x),))[1]
        assert np.isfinite(bend.astype("float32")).all()


def test_zero_is_not_a_kink():
    """Every derivative at 0 is the limit from both sides, in logits and targets."""
    with jax.enable_x64(True):

        def loss(x, y):
            return F.sigmoid_focal_loss(x, y, 0.25, 2.0, "sum")

        def derivatives(x):
            x, y = jnp.array(x), jnp.array(0.3)
            first, second = jax.grad(loss), jax.grad(jax.grad(loss))
            return [
                first(x, y),
                second(x, y),
                jax.grad(second)(x, y),
                jax.grad(loss, 1)(x, y),
                jax.grad(jax.grad(loss, 0), 1)(x, y),
                jax.grad(jax.grad(loss, 1), 0)(x, y),
                jax.grad(jax.grad(loss, 1), 1)(x, y),
            ]

        here = derivatives(0.0)
        assert_allclose(here[4], here[5], rtol=1e-14)
        assert_allclose(here, derivatives(1e-9), rtol=1e-7, atol=1e-8)
        assert_allclose(here, derivatives(-1e-9), rtol=1e-7, atol=1e-8)


def test_the_gradient_in_the_targets():
    x, y = logits(6), np.array([0, 1, 0.2, 0.5, 0, 1], np.float32)
    both = jax.grad(lambda x, y: F.sigmoid_focal_loss(x, y, reduction="sum"), (0, 1))(x, y)
    assert_allclose(both[0], reference.sigmoid_focal_loss_grad(x, y), rtol=1e-5)
    from jax.test_util import check_grads

    with jax.enable_x64(True):
        args = x.astype(float), np.clip(y, 0.1, 0.9).astype(float)
        check_grads(jax.jit(F.sigmoid_focal_loss), args, 2, ["fwd", "rev"])


def test_vmap_of_every_loss_is_a_loop_of_it():
    x, labels = logits(4, 6, 3), np.random.default_rng(2).integers(-2, 3, (4, 6))
    for f in (jax.jit(every_loss), jax.jit(jax.grad(every_loss))):
        expected = [f(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(x, labels, strict=True)]
        assert_allclose(jax.jit(jax.vmap(f))(x, labels), expected, rtol=1e-5, atol=1e-7)


ARRAYS = {
    "x": logits(6, 3),
    "y": soft(6, 3),
    "labels": LABELS,
    "boxes": crowd(6)[0],
    "anchors": crowd(6, 1)[0],
    "scores": crowd(6)[1],
    "classes": np.array([0, 1, 0, 1, 2, 2]),
    "deltas": logits(6, 4) / 3,
    "losses": crowd(6)[1],
}
EVERY_FUNCTION = {
    "sigmoid_focal_loss": ("x y", {"gamma": 0.5}),
    "sigmoid_focal_loss_star": ("x y", {"reduction": "mean"}),
    "balanced_cross_entropy": ("x y", {"reduction": "sum"}),
    "quality_focal_loss": ("x y", {"beta": 0.5}),
    "varifocal_loss": ("x y", {"reduction": "mean"}),
    "heatmap_focal_loss": ("x y", {"reduction": "positives"}),
    "asymmetric_loss": ("x y", {"margin": 0.1}),
    "sparse_sigmoid_focal_loss": ("x labels", {"reduction": "positives"}),
    "softmax_focal_loss": ("x classes", {"alpha": [1, 2, 3], "ignore_index": 2}),
    "smooth_l1_loss": ("x y", {"beta": 0.1}),
    "giou_loss": ("boxes anchors", {}),
    "box_area": ("boxes", {}),
    "box_iou": ("boxes anchors", {}),
    "generalized_box_iou": ("boxes anchors", {}),
    "encode_boxes": ("boxes anchors", {"weights": (10, 10, 5, 5)}),
    "decode_boxes": ("deltas anchors", {"weights": (10, 10, 5, 5)}),
    "clip_boxes": ("boxes", {"image_size": (64, 48)}),
    "nms": ("boxes scores", {"iou_threshold": 0.1}),
    "batched_nms": ("boxes scores classes", {"iou_threshold": 0.1}),
    "anchors": ("", {"image_size": (40, 70)}),
    "match_anchors": ("anchors boxes", {"foreground": 0.3, "background": 0.1}),
    "assign_targets": ("anchors boxes classes", {"allow_low_quality": True}),
    "subsample": ("labels", {"num_samples": 4, "noise": crowd(6)[1]}),
    "hard_example_mask": ("losses", {"num_examples": 3}),
}


def test_every_function_is_listed():
    bound = {name for name in F.__all__ if getattr(F, name).__module__ == F.__name__}
    assert set(EVERY_FUNCTION) == bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_every_function_compiled_equals_eager(dtype):
    def everything(arrays):
        return {
            name: jax.tree.leaves(getattr(F, name)(*map(arrays.get, names.split()), **options))
            for name, (names, options) in EVERY_FUNCTION.items()
        }

    with jax.enable_x64(dtype == "float64"):
        arrays = {n: jnp.asarray(a) for n, a in ARRAYS.items()}
        floats = {n: a.astype(dtype) for n, a in arrays.items() if a.dtype.kind == "f"}
        arrays |= floats
        results = everything(arrays), jax.jit(everything)(arrays)
    for name in EVERY_FUNCTION:
        for eager, compiled in zip(*(result[name] for result in results), strict=True):
            assert compiled.dtype == eager.dtype, name
            if jnp.issubdtype(eager.dtype, jnp.floating):
                eager, compiled = (np.asarray(a, np.float64) for a in (eager, compiled))
                # The compiler contracts a product and a sum into one rounding.
                rounding = 4 * float(jnp.finfo(dtype).eps)
                at_zero = rounding * abs(eager).max()
                assert_allclose(compiled, eager, rtol=rounding, atol=at_zero, err_msg=name)
            else:
                assert_array_equal(compiled[: len(eager)], eager, err_msg=name)
                assert_array_equal(compiled[len(eager) :], -1)  # the padding of `nms`


def test_what_is_an_array():
    expected = F.sigmoid_focal_loss(jnp.zeros(2), jnp.ones(2))
    assert_array_equal(F.sigmoid_focal_loss(np.zeros(2), np.ones(2)), expected)
    assert F.sigmoid_focal_loss(np.zeros(2), np.ones(2)).dtype == jnp.float32

    class Variable:
        def __jax_array__(self):
            return jnp.zeros(2)

    assert_array_equal(F.sigmoid_focal_loss(Variable(), jnp.ones(2)), expected)
    with pytest.raises(TypeError, match="inputs must be a JAX or NumPy array; got object"):
        F.sigmoid_focal_loss(object(), jnp.ones(2))
    with pytest.raises(TypeError, match="inputs must be a JAX or NumPy array; got list"):
        F.sigmoid_focal_loss([0.0, 0.0], jnp.ones(2))
    with pytest.raises(TypeError, match="inputs must be a JAX or NumPy array; got ndarray"):
        F.sigmoid_focal_loss(np.array(["a"]), jnp.ones(1))


def test_parameters_of_flax_are_arrays():
    nnx = pytest.importorskip("flax.nnx")
    found = F.sigmoid_focal_loss(nnx.Param(jnp.zeros(2)), jnp.ones(2))
    assert_array_equal(found, F.sigmoid_focal_loss(jnp.zeros(2), jnp.ones(2)))


def test_wrong_shapes_are_reported_while_tracing():
    message = r"got inputs \(4, 1\), targets \(4,\)"
    with pytest.raises(ValueError, match=message):
        jax.jit(F.sigmoid_focal_loss)(jnp.zeros((4, 1)), jnp.zeros(4))


# ---------------------------------------------------------------- boxes and targets


@pytest.mark.parametrize("n", [0, 1, 300])
def test_nms_in_jit_is_padded(n):
    boxes, scores = crowd(n)
    classes = np.arange(n) % 2
    for name, args in (("nms", ()), ("batched_nms", (classes,))):
        expected = getattr(reference, name)(boxes, scores, *args, 0.5)
        nms = getattr(F, name)
        assert_array_equal(nms(boxes, scores, *args, 0.5), expected)
        padded = jax.jit(nms, static_argnums=2 + len(args))(boxes, scores, *args, 0.5)
        assert padded.shape == (n,)
        assert_array_equal(padded[: len(expected)], expected)
        assert_array_equal(padded[len(expected) :], -1)


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("allow_low_quality", [False, True])
def test_compiled_targets_equal_numpy(count, allow_low_quality):
    anchors = np.asarray(F.anchors((64, 96)))
    boxes, labels = crowd(count)[0], np.arange(count)

    def assign(boxes, labels):
        return F.assign_targets(anchors, boxes, labels, 0.5, 0.4, allow_low_quality)

    expected = reference.assign_targets(anchors, boxes, labels, 0.5, 0.4, allow_low_quality)
    for f in (assign, jax.jit(assign)):
        got = f(boxes, labels)
        assert got[0].dtype == jnp.int32
        assert_array_equal(got[0], expected[0])
        assert_allclose(got[1], expected[1], rtol=1e-5, atol=1e-6)
    pair = np.stack([boxes, boxes[::-1]]), np.stack([labels, labels[::-1]])
    batch = jax.jit(jax.vmap(assign))(*pair)
    assert_array_equal(batch[0][0], expected[0])
    slopes = jax.jit(jax.grad(lambda b: assign(b, labels)[1].sum()))(boxes)
    assert np.isfinite(slopes).all()


def test_compiled_samplers_equal_numpy():
    boxes, losses = crowd(60)
    labels = np.random.default_rng(3).integers(-2, 3, 60)
    assert_array_equal(
        jax.jit(lambda t, noise: F.subsample(t, 20, noise=noise))(labels, losses),
        reference.subsample(labels, 20, noise=losses),
    )
    options = {"positive": labels > 0, "negative_ratio": 3, "boxes": boxes, "iou_threshold": 0.5}
    assert_array_equal(
        jax.jit(lambda x: F.hard_example_mask(x, 20, **options))(losses),
        reference.hard_example_mask(losses, 20, **options),
    )


# ---------------------------------------------------------------- training


def test_shard_map_equals_one_device():
    script = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import PartitionSpec as P
        import focal.jax as F

        assert jax.device_count() == 2
        mesh = jax.sharding.Mesh(jax.devices(), ("data",))
        random = np.random.default_rng(0)
        x, labels = random.normal(size=(8, 3)).astype("f"), random.integers(-2, 3, 8)
        boxes = random.uniform(0, 60, (2, 5, 2))
        boxes = np.concatenate([boxes, boxes + 30], -1).astype("f")
        anchors = F.anchors((64, 64))

        def total(x, labels):
            return F.sparse_sigmoid_focal_loss(x, labels, reduction="sum")

        def local(x, labels):
            return jax.lax.psum(total(x, labels), "data")

        over = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P())
        got = jax.jit(jax.value_and_grad(over))(x, labels)
        expected = jax.jit(jax.value_and_grad(total))(x, labels)
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
        np.testing.assert_allclose(got[1], expected[1], rtol=1e-6)

        w, x4 = random.normal(size=(4, 3)).astype("f"), random.normal(size=(8, 4)).astype("f")
        sparse = np.array([0, 1, 2, 0, -1, -1, 2, -2])  # four positives, and one

        def share(w, x, labels):
            return total(x @ w, labels) / F.num_positives(labels, "data")

        def added(w, x, labels):
            return jax.lax.psum(share(w, x, labels), "data")

        def inside(w, x, labels):
            return jax.grad(share)(w, x, labels)

        def added_inside(w, x, labels):
            return jax.lax.psum(inside(w, x, labels), "data")

        expected = jax.grad(
            lambda w: F.sparse_sigmoid_focal_loss(x4 @ w, sparse, reduction="positives")
        )(w)
        specs = {"mesh": mesh, "in_specs": (P(), P("data"), P("data")), "out_specs": P()}
        for gradient in (
            jax.grad(jax.shard_map(added, **specs)),
            jax.grad(jax.shard_map(added, check_vma=False, **specs)),
            jax.shard_map(inside, **specs),
            jax.shard_map(added_inside, check_vma=False, **specs),
        ):
            got = jax.jit(gradient)(w, x4, sparse)
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
        twice = jax.shard_map(added_inside, **specs)(w, x4, sparse)  # as documented
        np.testing.assert_allclose(twice, 2 * expected, rtol=1e-5, atol=1e-7)

        def match(boxes):
            return F.match_anchors(anchors, boxes, allow_low_quality=True)

        def keep(boxes):
            return F.nms(boxes[0], boxes[0, :, 0], 0.3)

        for f in (match, keep):
            over = jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
            each = [np.ravel(jax.jit(f)(boxes[i : i + 1])) for i in range(2)]
            np.testing.assert_array_equal(np.ravel(jax.jit(over)(boxes)), np.concatenate(each))
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(Path(F.__file__).parents[2]),
    }
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_loss_outside_of_jit_is_compiled_once(caplog):
    """Neither a call nor its gradient compiles anything the second time."""
    x, y = jnp.asarray(logits(7, 5)), jnp.asarray(soft(7, 5))
    both = jax.value_and_grad(lambda x: F.sigmoid_focal_loss(x, y, reduction="sum"))
    with jax.log_compiles():
        first = both(x)
        assert "ompil" in caplog.text
        caplog.clear()
        second = both(x)
        assert "ompil" not in caplog.text
    for a, b in zip(first, second, strict=True):
        assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("shape", "arrays"), [((1000, 80), 1), ((80_000,), 2), ((1, 80_000), 2), ((2, 40_000), 2)]
)
def test_a_sum_needs_few_arrays_of_the_size_of_the_logits(shape, arrays):
    """On a CPU, XLA cuts the loop that a sum ends into five, with four arrays between them."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)

    def total(x, y):
        return F.sigmoid_focal_loss(x, y, reduction="sum")

    for function, most in ((total, 1), (jax.value_and_grad(total), arrays)):
        program = jax.jit(function).lower(x, x).compile()
        assert program.memory_analysis().temp_size_in_bytes < 1.1 * 4 * 80_000 * most


@pytest.mark.parametrize("shape", [(2, 1_000_000), (1_000_000, 2), (1_000_003,)])
def test_a_sum_of_many_numbers_is_exact(shape):
    """Added one after the other, a million equal numbers would lose four digits."""
    with jax.default_matmul_precision("F16_F16_F16"):
        total = F.sigmoid_focal_loss(jnp.zeros(shape), jnp.zeros(shape), reduction="sum")
    each = float(F.sigmoid_focal_loss(jnp.zeros(1), jnp.zeros(1))[0])
    assert float(total) == pytest.approx(each * math.prod(shape), rel=1e-6)


def test_a_training_step_compiles_once():
    optax = pytest.importorskip("optax")
    traces = []
    optimizer = optax.sgd(0.5)

    @jax.jit
    def step(weights, state, x, labels):
        traces.append(1)

        def loss(weights):
            return F.sparse_sigmoid_focal_loss(x @ weights, labels, reduction="positives")

        value, slope = jax.value_and_grad(loss)(weights)
        change, state = optimizer.update(slope, state)
        return optax.apply_updates(weights, change), state, value

    # optax itself mixes types, so that strict promotion ends here.
    with jax.numpy_dtype_promotion("standard"):
        weights = jnp.zeros((4, 3))
        state, values = optimizer.init(weights), []
        for seed in range(5):
            labels = np.random.default_rng(seed).permutation(LABELS)
            weights, state, value = step(weights, state, np.eye(6, 4)[labels], labels)
            values.append(value)
    assert len(traces) == 1
    assert values[-1] < values[0]


def test_prior_bias_init():
    init = F.prior_bias_init([0.01, 0.1, 0.5])
    bias = init(jax.random.key(0), (6,), jnp.float32)
    assert bias.dtype == jnp.float32
    assert_allclose(jax.nn.sigmoid(bias), [0.01, 0.1, 0.5] * 2, rtol=1e-6)
    assert init(None, (3,), jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"a multiple of that of pi \(3\); got shape \(4,\)"):
        init(None, (4,))
    with pytest.raises(ValueError, match="a number or one per class"):
        F.prior_bias_init([[0.1]])


def test_prior_bias_init_in_flax():
    linen, nnx = pytest.importorskip("flax.linen"), pytest.importorskip("flax.nnx")
    init = F.prior_bias_init(0.01)
    with jax.numpy_dtype_promotion("standard"):
        conv = nnx.Conv(
            4, 6, (3, 3), kernel_init=nnx.initializers.zeros, bias_init=init, rngs=nnx.Rngs(0)
        )
        dense = linen.Dense(6, bias_init=init).init(jax.random.key(0), jnp.zeros((1, 4)))
    for bias in (conv.bias[...], dense["params"]["bias"]):
        assert_allclose(jax.nn.sigmoid(bias), np.full(6, 0.01), rtol=1e-6)


# ---------------------------------------------------------------- boxes, as strict users have them


def test_boxes_under_strict_rank_promotion():
    """Nothing relies on leading axes that JAX adds by itself."""

    def everything(anchors, boxes, labels):
        one, scores = boxes[0], boxes[0, :, 0]
        return (
            F.match_anchors(anchors, one),
            F.match_anchors(anchors, boxes, allow_low_quality=True),
            F.assign_targets(anchors, one, labels[0]),
            F.assign_targets(anchors, boxes, labels),
            F.box_iou(boxes, anchors),
            F.box_iou(anchors, boxes),
            F.generalized_box_iou(boxes, one),
            F.encode_boxes(boxes, one),
            F.encode_boxes(one, boxes),
            F.decode_boxes(boxes, one),
            F.clip_boxes(boxes, (32, 32)),
            F.giou_loss(boxes, boxes[::-1], "mean"),
            F.smooth_l1_loss(boxes, boxes[::-1], 0.1, "mean"),
            F.nms(one, scores, 0.5),
            F.batched_nms(one, scores, labels[0], 0.5),
            F.subsample(labels, 4, noise=boxes[..., 0]),
            F.hard_example_mask(scores, 3, boxes=one, iou_threshold=0.5),
            suppress(xp, boxes, labels, 0.5),
        )

    arguments = proper_boxes(20), proper_boxes(3, 7), np.zeros((3, 7), np.int32)
    with jax.numpy_rank_promotion("raise"):
        shapes = jax.eval_shape(everything, *arguments)
    assert shapes[3][1].shape == (3, 20, 4)
    # Eager, the first box is compared by another way than the rest.
    boxes, labels = proper_boxes(2, 2), np.zeros((2, 2), np.int32)
    with jax.numpy_rank_promotion("raise"):
        assigned, _ = F.assign_targets(boxes[0], boxes, labels, allow_low_quality=True)
    assert_array_equal(assigned[0], [0, 0])


@pytest.mark.parametrize("allow_low_quality", [False, True])
@pytest.mark.parametrize("batch", ["", "b,"])
def test_matching_is_exported_for_any_number_of_boxes(batch, allow_low_quality):
    def assign(anchors, boxes, labels):
        options = {"allow_low_quality": allow_low_quality}
        match = F.match_anchors(anchors, boxes, **options)
        return match, *F.assign_targets(anchors, boxes, labels, **options)

    sizes = {"n,4": np.float32, f"{batch}m,4": np.float32, f"{batch}m": np.int32}
    scope = jax.export.SymbolicScope()
    arguments = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(size, scope=scope), dtype)
        for size, dtype in sizes.items()
    ]
    exported = jax.export.export(jax.jit(assign))(*arguments)
    anchors = np.asarray(F.anchors((64, 48)))
    for images, count in ((1, 1), (3, 9)):
        lead = (images,) if batch else ()
        boxes = proper_boxes(*lead, count)
        labels = np.arange(boxes[..., 0].size, dtype=np.int32).reshape(boxes.shape[:-1])
        expected = jax.jit(assign)(anchors, boxes, labels)
        for a, b in zip(exported.call(anchors, boxes, labels), expected, strict=True):
            assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_nms_compiles_nothing_for_another_number_of_boxes(caplog):
    def compiled(n):
        data = proper_boxes(n), np.arange(n, dtype=np.float32), np.arange(n) % 3
        boxes, scores, classes = map(jnp.asarray, data)
        caplog.clear()
        with jax.log_compiles(True):
            kept = F.nms(boxes, scores, 0.5), F.batched_nms(boxes, scores, classes, 0.5)
        assert_array_equal(kept[0], reference.nms(*data[:2], 0.5))
        assert_array_equal(kept[1], reference.batched_nms(*data, 0.5))
        return [r.message for r in caplog.records if r.message.startswith("Compiling")]

    jax.clear_caches()
    assert compiled(300)
    for n in (301, 407, 512, 290):
        assert compiled(n) == []


def test_what_nms_compiles_and_holds_does_not_grow_with_the_boxes():
    def lowered(n):
        boxes, scores = jnp.zeros((n, 4)), jnp.zeros(n)
        return jax.jit(F.nms, static_argnums=2).lower(boxes, scores, 0.5)

    few, many = lowered(700), lowered(20_001)
    assert len(many.as_text().splitlines()) == len(few.as_text().splitlines())
    # Less than one overlap in a byte for each of 100 partners; the whole matrix has 20,000.
    assert many.compile().memory_analysis().temp_size_in_bytes < 100 * 20_000


def test_nms_of_a_batch_of_unlike_lists():
    """vmap: every list ends its rounds by itself."""
    chain = np.stack([np.zeros(200), np.arange(200) * 5, np.full(200, 10), np.arange(200) * 5 + 10])
    lists = np.stack([chain.T.astype(np.float32), proper_boxes(200), proper_boxes(200, seed=1)])
    scores = np.stack([-np.arange(200, dtype=np.float32)] * 3)
    for nms in (
        jax.vmap(partial(F.nms, iou_threshold=0.2)),
        jax.jit(jax.vmap(lambda b, s: F.nms(b, s, 0.2))),
    ):
        for kept, b, s in zip(nms(lists, scores), lists, scores, strict=True):
            assert_array_equal(kept[kept >= 0], reference.nms(b, s, 0.2))


def test_nms_lets_the_gradient_of_the_boxes_through():
    boxes, scores = crowd(300)
    kept = np.isin(np.arange(300), reference.nms(boxes, scores, 0.5))

    def total(boxes):
        at = F.nms(boxes, scores, 0.5)
        return jnp.where(at >= 0, boxes[at, 2], 0).sum()

    for gradient in (jax.grad(total), jax.jit(jax.grad(total))):
        assert_array_equal(gradient(boxes)[:, 2], kept)


def test_kinks_compiled_and_twice():
    with jax.enable_x64(True):
        zero, two = np.zeros(3), np.array([[0.0, 0.0, 2.0, 2.0]])
        touching = np.array([[2.0, 1.0, 4.0, 3.0]])
        for function, x, first in (
            (lambda x: F.smooth_l1_loss(x, zero, 0.0, "sum"), zero, zero),
            (lambda x: F.clip_boxes(x, (2, 2)).sum(), two, np.ones_like(two)),
            (lambda x: F.box_iou(x, touching).sum(), two, [[0, 0, 1 / 8, 0]]),
            (lambda x: F.giou_loss(x, two, "sum"), two, np.zeros_like(two)),
        ):
            assert_array_equal(jax.jit(jax.grad(function))(x), first)
            bend = jax.jit(jax.hessian(function))(x)
            assert np.isfinite(bend).all()
            assert_allclose(bend, jax.jacfwd(jax.grad(function))(x), atol=1e-15)


def test_subsample_asks_for_noise_where_it_is_traced():
    labels = np.random.default_rng(0).integers(-1, 1, (2, 50))
    message = "subsample: noise must be given where the function is traced"
    for traced in (
        lambda: jax.jit(lambda t: F.subsample(t, 8))(labels),
        lambda: jax.jit(lambda: F.subsample(labels, 8))(),  # constant labels, and still a trace
        lambda: jax.vmap(lambda t: F.subsample(t, 8))(labels),
    ):
        with pytest.raises(ValueError, match=message):
            traced()
    draw = jax.jit(lambda key: F.subsample(labels, 8, noise=jax.random.uniform(key, (2, 50))))
    samples = [np.asarray(draw(jax.random.key(seed))) for seed in (0, 1, 0)]
    assert_array_equal(samples[0], samples[2])
    assert (samples[0] != samples[1]).any()
    assert_array_equal((samples[1] > -2).sum(-1), 8)


def test_matching_and_nms_need_no_name_of_jax_that_is_not_public(monkeypatch):
    """`jax.core.Tracer` has been announced to go; whether there are values is asked otherwise."""
    monkeypatch.delattr(jax.core, "Tracer", raising=False)
    boxes, scores = crowd(40)
    for f in (lambda b: F.match_anchors(b, b), lambda b: F.nms(b, scores, 0.5)):
        eager, traced = f(boxes), jax.jit(f)(boxes)
        assert_array_equal(traced[: len(eager)], eager)
