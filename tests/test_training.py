"""The training loop: that it learns, what it writes, and that it goes on where it stopped."""

import json
import math
import os

import numpy as np
import pytest
from backends import RETINANETS

pytest.importorskip("torch")
pytest.importorskip("pycocotools")
import torch

from focal.core.anchors import AnchorConfig
from focal.retinanet import PRESETS, RetinaNetConfig, TrainConfig, build, load, predict, raw_outputs
from focal.retinanet.backend_torch import Trainer, state
from focal.retinanet.data import ShapesDataset, train_batches
from focal.retinanet.loop import learning_rate, train
from focal.retinanet.weights import load_weights, read_tensors

CONFIG = PRESETS["tiny"].detector.replace(
    classes=("circle", "square", "triangle"),
    canvas=(64, 64),
    channels=16,
    head_depth=1,
    anchors=AnchorConfig(strides=(8, 16, 32), sizes=(12.0, 24.0, 48.0)),
)
RUN = TrainConfig(
    steps=6,
    batch_size=2,
    optimizer="adamw",
    learning_rate=1e-3,
    warmup=2,
    precision="float32",
    workers=0,
    log_every=2,
    save_every=3,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads gain nothing on networks this small, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shapes(split="train", num_images=8, **options):
    return ShapesDataset(split, size=(64, 64), num_images=num_images, **options)


def fit(out, run=RUN, config=CONFIG, data=None, validation=None, **options):
    data = shapes() if data is None else data
    return train(config, run, data, validation, out, device="cpu", **options)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def trainer_and_batch(run=RUN, config=CONFIG):
    batch = next(train_batches(shapes(), config, run))
    return Trainer(build(config, device="cpu"), run), batch


def weights_of(trainer):
    return {k: v.detach().clone() for k, v in trainer.model.named_parameters()}


def assert_same(found, expected):
    """Equal bit for bit, all of them."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


# Learning


def test_it_learns_eight_images_by_heart(tmp_path):
    data = shapes(num_objects=4, object_size=(12, 32))
    run = RUN.replace(
        steps=80,
        batch_size=8,
        learning_rate=3e-3,
        schedule="cosine",
        warmup=20,
        clip_norm=10.0,
        flips="none",
    )
    fit(tmp_path, run, CONFIG.replace(channels=32), data=data, validation=data)
    first, *_, last, evaluation = lines(tmp_path)
    assert last["loss"] < first["loss"] / 10
    assert evaluation["AP50"] >= 0.9


@pytest.mark.parametrize(
    "run",
    [
        RUN.replace(optimizer="sgd", learning_rate=0.02),
        RUN.replace(optimizer="adamw"),
        RUN.replace(precision="bfloat16"),
    ],
    ids=["sgd", "adamw", "bfloat16"],
)
def test_steps_go_downhill(run):
    trainer, batch = trainer_and_batch(run)
    losses = [float(trainer.step(i, batch, run.learning_rate)["loss"]) for i in range(6)]
    assert losses[-1] < 0.9 * losses[0]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_learning_rate_of_0_moves_no_weight(optimizer):
    trainer, batch = trainer_and_batch(RUN.replace(optimizer=optimizer, weight_decay=0.1))
    before = weights_of(trainer)
    trainer.step(0, batch, 0.0)
    for name, x in weights_of(trainer).items():
        assert torch.equal(x, before[name]), name


def test_clipping_bounds_the_step():
    run = RUN.replace(optimizer="sgd", momentum=0.0, weight_decay=0.0, clip_norm=1e-2)
    trainer, batch = trainer_and_batch(run)
    before = weights_of(trainer)
    trainer.step(0, batch, 1.0)
    moved = [(x - before[name]).square().sum() for name, x in weights_of(trainer).items()]
    assert math.sqrt(sum(moved)) == pytest.approx(1e-2, rel=1e-3)


def test_the_loss_is_the_sum_of_its_parts_over_the_positives():
    trainer, batch = trainer_and_batch()
    parts = {k: float(v) for k, v in trainer.step(0, batch, 1e-3).items()}
    assert parts["loss"] == pytest.approx(parts["classification"] + parts["box"])
    assert parts["positives"] > 0

    # A running mean begins at 100 and takes a tenth of each batch's positives.
    running, _ = trainer_and_batch(config=CONFIG.replace(normaliser="ema"))
    found = {k: float(v) for k, v in running.step(0, batch, 1e-3).items()}
    ratio = parts["positives"] / (90 + 0.1 * parts["positives"])
    assert found["positives"] == parts["positives"]
    assert found["classification"] == pytest.approx(parts["classification"] * ratio, rel=1e-5)
    assert found["box"] == pytest.approx(parts["box"] * ratio, rel=1e-5)


def test_frozen_statistics_stay():
    trainer, batch = trainer_and_batch(config=CONFIG.replace(norm="frozen_batch"))
    before = {k: v.clone() for k, v in trainer.model.named_buffers()}
    trainer.step(0, batch, 1e-2)
    assert before
    for name, x in trainer.model.named_buffers():
        assert torch.equal(x, before[name]), name


def test_the_average_of_the_weights():
    trainer, batch = trainer_and_batch(RUN.replace(ema=0.9))
    initial = weights_of(trainer)
    trainer.step(0, batch, 1e-3)
    own, kept = weights_of(trainer), trainer.weights()
    for name, x in own.items():  # 1/10 of the old in the first step
        expected = 0.1 * initial[name] + 0.9 * x
        np.testing.assert_allclose(kept[name], expected, rtol=1e-5, atol=1e-8, err_msg=name)
    assert (kept["backbone.body.conv1.weight"] != own["backbone.body.conv1.weight"].numpy()).any()
    for step in range(100, 103):
        before = trainer.weights()
        trainer.step(step, batch, 1e-3)
        name = "backbone.body.bn1.running_mean"
        expected = 0.9 * before[name] + 0.1 * trainer.model.state_dict()[name].numpy()
        np.testing.assert_allclose(trainer.weights()[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("normaliser", ["batch", "image", "ema"])
def test_images_without_boxes_are_no_trouble(tmp_path, normaliser):
    empty = shapes(num_images=3, num_objects=0)
    assert empty.max_boxes == 0
    fit(tmp_path, RUN.replace(steps=2), CONFIG.replace(normaliser=normaliser), data=empty)
    (line,) = lines(tmp_path)
    assert 0 < line["classification"] < math.inf
    assert line["box"] == line["positives"] == 0
    tensors, _ = load_weights(tmp_path / "weights.safetensors")
    assert all(np.isfinite(x).all() for x in tensors.values())


def test_it_starts_from_given_weights(tmp_path):
    start = {k: v + 1 for k, v in fit(tmp_path / "a", RUN.replace(steps=1)).state_dict().items()}
    start = {k: v.numpy() for k, v in start.items() if "num_batches" not in k}
    fit(tmp_path / "b", RUN.replace(steps=1, learning_rate=0.0), initial=start)
    tensors, _ = load_weights(tmp_path / "b" / "weights.safetensors")
    for name, x in start.items():
        if "running" not in name:
            np.testing.assert_array_equal(tensors[name], x)
    with pytest.raises(ValueError, match="weights are not those of this network"):
        fit(tmp_path / "c", config=CONFIG.replace(channels=8), initial=start)


# The schedule


def rates(**changes):
    run = TrainConfig(learning_rate=1.0, warmup=0).replace(**changes)
    return [learning_rate(run, step) for step in range(run.steps)]


def test_warm_up_is_a_straight_line():
    assert rates(steps=6, warmup=4, milestones=()) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rates(steps=3, warmup=0, milestones=()) == [1, 1, 1]
    assert rates(steps=2, warmup=10, milestones=()) == [0.1, 0.2]


def test_milestones_divide_by_ten():
    found = rates(steps=90, milestones=(60 / 90, 80 / 90))
    assert found == pytest.approx([1] * 60 + [0.1] * 20 + [0.01] * 10)
    assert rates(steps=4, milestones=(0.5, 1.0)) == pytest.approx([1, 1, 0.1, 0.1])


def test_the_papers_schedule():
    run = TrainConfig()
    steps = (0, 499, 59_999, 60_000, 79_999, 80_000, 89_999)
    found = [learning_rate(run, step) for step in steps]
    assert found == pytest.approx([2e-5, 0.01, 0.01, 0.001, 0.001, 1e-4, 1e-4])


def test_cosine_falls_from_1_to_nearly_0():
    found = rates(steps=1000, schedule="cosine")
    assert found[0] == 1 and found[500] == pytest.approx(0.5)
    assert (np.diff(found) < 0).all() and 0 < found[-1] < 1e-5
    warm = rates(steps=1000, schedule="cosine", warmup=100)
    assert warm[:100] == pytest.approx([(i + 1) / 100 * found[i] for i in range(100)])
    assert warm[100:] == found[100:]


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_a_single_step_is_a_schedule(schedule):
    assert rates(steps=1, schedule=schedule) == [1]
    assert rates(steps=1, schedule=schedule, learning_rate=0.0) == [0]


# The run folder


def test_what_a_run_leaves(tmp_path):
    out, validation = tmp_path / "deep" / "run", shapes("val", 3)
    run = RUN.replace(steps=5, eval_every=2)
    model = fit(out, run, validation=validation, notes={"data": "mine"})
    assert sorted(os.listdir(out)) == [
        "checkpoint.safetensors",
        "config.json",
        "metrics.jsonl",
        "weights.safetensors",
    ]

    found = lines(out)
    assert [(x["kind"], x["step"]) for x in found] == [
        ("train", 2),
        ("eval", 2),
        ("train", 4),
        ("eval", 4),
        ("train", 5),
        ("eval", 5),
    ]
    for line in found:
        if line["kind"] == "train":
            assert line["loss"] == pytest.approx(line["classification"] + line["box"])
            assert line["learning_rate"] == learning_rate(run, line["step"] - 1)
            assert line["images_per_second"] > 0 and line["seconds"] > 0
        else:
            assert line["split"] == "shapes/val" and 0 <= line["AP"] <= line["AP50"] <= 1

    record = json.loads((out / "config.json").read_text())
    assert RetinaNetConfig.from_json(json.dumps(record["detector"])) == CONFIG
    assert TrainConfig.from_json(json.dumps(record["train"])) == run
    assert record["data"] == "mine" and record["backend"] == "torch"
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["versions"]["torch"] == torch.__version__
    assert record["device"].startswith("cpu") and record["seconds"] > 0

    loaded = load(out / "weights.safetensors", device="cpu")
    assert loaded.config == CONFIG and not model.training
    images = [validation[i].image for i in range(3)]
    for ours, theirs in zip(raw_outputs(model, images), raw_outputs(loaded, images), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(predict(model, images), predict(loaded, images), strict=True):
        np.testing.assert_array_equal(ours["boxes"], theirs["boxes"])


def test_the_average_is_what_is_kept(tmp_path):
    model = fit(tmp_path, RUN.replace(ema=0.9))
    kept, _ = load_weights(tmp_path / "weights.safetensors")
    checkpoint, _ = read_tensors(tmp_path / "checkpoint.safetensors", "focal.checkpoint")
    assert_same(state(model), kept)
    assert_same({name: checkpoint[f"average/{name}"] for name in kept}, kept)
    name = "head.classification_head.cls_logits.weight"
    assert (kept[name] != checkpoint[f"model/{name}"]).any()


def test_without_checkpoints_there_is_one_at_the_end(tmp_path):
    fit(tmp_path, RUN.replace(steps=2, save_every=0))
    _, metadata = read_tensors(tmp_path / "checkpoint.safetensors", "focal.checkpoint")
    assert metadata["step"] == "2"


def test_a_new_run_in_an_old_folder_starts_over(tmp_path):
    first, second = fit(tmp_path), fit(tmp_path)
    assert_same(first.state_dict(), second.state_dict())
    assert [x["step"] for x in lines(tmp_path)] == [2, 4, 6]


# Going on


class Stopped(Exception):
    pass


def stop_at(monkeypatch, step):
    """The step with this number fails."""
    whole = Trainer.step

    def short(self, number, batch, rate):
        if number == step:
            raise Stopped
        return whole(self, number, batch, rate)

    monkeypatch.setattr(Trainer, "step", short)


AUGMENTED = RUN.replace(crop=(48, 56), zoom=(0.8, 1.25), flips="eightfold", jitter=0.2)


@pytest.mark.parametrize(
    ("run", "config"),
    [
        (RUN, CONFIG),
        (RUN.replace(optimizer="sgd", workers=1), CONFIG),
        (AUGMENTED.replace(ema=0.9, schedule="cosine", clip_norm=1.0), CONFIG),
        (RUN.replace(ema=0.99), CONFIG.replace(normaliser="ema", norm="group")),
    ],
    ids=["adamw", "sgd", "augmented", "running means"],
)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path, monkeypatch, run, config):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fit(whole, run, config)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)  # the checkpoint is of step 3; line 4 of the metrics is written
        with pytest.raises(Stopped):
            fit(stopped, run, config)
    assert not (stopped / "weights.safetensors").exists()
    fit(stopped, run, config, resume=True)

    for name in ("checkpoint.safetensors", "weights.safetensors"):
        kind = "focal.checkpoint" if "check" in name else "focal.retinanet"
        expected, _ = read_tensors(whole / name, kind)
        found, _ = read_tensors(stopped / name, kind)
        assert_same(found, expected)
    for line, expected in zip(lines(stopped), lines(whole), strict=True):
        for clock in ("images_per_second", "seconds"):
            del line[clock], expected[clock]
        assert line == expected


def test_going_on_after_the_end_changes_nothing(tmp_path):
    first = fit(tmp_path)
    second = fit(tmp_path, resume=True)
    assert_same(first.state_dict(), second.state_dict())
    assert [x["step"] for x in lines(tmp_path)] == [2, 4, 6]


@pytest.mark.parametrize("keep", [0, 5, -9])
def test_a_truncated_checkpoint(tmp_path, keep):
    fit(tmp_path, RUN.replace(steps=1))
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"^\S+checkpoint\.safetensors: expected a whole saf.*$"):
        fit(tmp_path, resume=True)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a file of format 'focal\.checkpoint'"):
        fit(tmp_path, resume=True)


def test_weights_are_no_checkpoint(tmp_path):
    fit(tmp_path, RUN.replace(steps=1))
    (tmp_path / "weights.safetensors").rename(tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match=r"expected format 'focal\.checkpoint'"):
        fit(tmp_path, resume=True)


def test_a_checkpoint_of_another_network(tmp_path):
    fit(tmp_path, RUN.replace(steps=1))
    with pytest.raises(ValueError, match="weights are not those of this network"):
        fit(tmp_path, config=CONFIG.replace(channels=8), resume=True)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"optimizer": "sgd"}, CONFIG, "another optimizer; expected sgd, found adamw"),
        ({"ema": None}, CONFIG, "another ema; expected off, found on"),
        ({}, CONFIG.replace(classes=("a", "b", "c")), "another classes"),
    ],
)
def test_a_checkpoint_of_another_run(tmp_path, change, config, message):
    run = RUN.replace(steps=1, ema=0.9)
    fit(tmp_path, run)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, run.replace(**change), config, resume=True)


@pytest.mark.parametrize("backend", [b for b in RETINANETS if b != "torch"])
def test_a_checkpoint_of_another_framework(tmp_path, backend):
    fit(tmp_path, RUN.replace(steps=1))
    with pytest.raises(ValueError, match=f"another backend; expected {backend}, found torch"):
        fit(tmp_path, resume=True, backend=backend)


def test_a_line_cut_short_by_the_kill_is_dropped(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(Stopped):
            fit(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    fit(tmp_path, resume=True)
    assert [x["step"] for x in lines(tmp_path)] == [2, 4, 6]
