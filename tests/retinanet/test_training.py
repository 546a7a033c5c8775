"""The training loop: that it learns, what it writes, and that it goes on where it stopped."""

import errno
import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import threading

import numpy as np
import pytest
from backends import RETINANETS
from detectors import CONFIG, assert_same

pytest.importorskip("torch")
pytest.importorskip("pycocotools")
import torch

from focal.retinanet import (
    RetinaNetConfig,
    TrainConfig,
    build,
    load,
    predict,
    raw_outputs,
)
from focal.retinanet.data import ShapesDataset, train_batches
from focal.retinanet.torch import trainer as backend_torch
from focal.retinanet.torch.trainer import Trainer, state
from focal.retinanet.training import loop, progress
from focal.retinanet.training.first_loss import first_loss
from focal.retinanet.training.loop import learning_rate, train
from focal.retinanet.training.run_folder import RunFolder
from focal.retinanet.training.stopping import Signals, Stopped
from focal.retinanet.weights import load_weights, read_checkpoint

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


pytestmark = pytest.mark.usefixtures("one_thread", "quick_jax")


def shapes(split="train", num_images=8, **options):
    return ShapesDataset(split, size=(64, 64), num_images=num_images, **options)


def fit(out, run=RUN, config=CONFIG, data=None, validation=None, **options):
    data = shapes() if data is None else data
    return train(config, run, data, validation, out, device="cpu", **options)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def checkpoints(out):
    """The steps of the checkpoints that are there."""
    return sorted(int(path.stem[-6:]) for path in out.glob("checkpoint-*.safetensors"))


def trainer_and_batch(run=RUN, config=CONFIG):
    batch = next(train_batches(shapes(), config, run))
    return Trainer(build(config, device="cpu"), run), batch


def weights_of(trainer):
    return {k: v.detach().clone() for k, v in trainer.model.named_parameters()}


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


def test_steps_of_sgd_go_downhill():
    run = RUN.replace(optimizer="sgd", learning_rate=0.02)
    trainer, batch = trainer_and_batch(run)
    losses = [float(trainer.step(i, batch, run.learning_rate)["loss"]) for i in range(6)]
    assert losses[-1] < 0.9 * losses[0]


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
    running, _ = trainer_and_batch(config=CONFIG.replace(normalizer="ema"))
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


@pytest.mark.parametrize("normalizer", ["batch", "image", "ema"])
def test_images_without_boxes_are_no_trouble(tmp_path, normalizer):
    empty = shapes(num_images=3, num_objects=0)
    assert empty.max_boxes == 0
    fit(tmp_path, RUN.replace(steps=2), CONFIG.replace(normalizer=normalizer), data=empty)
    (line,) = lines(tmp_path)
    assert 0 < line["classification"] < math.inf
    assert line["box"] == 0 and line["positives"] == 1  # never less, as a normalizer
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
        "best.safetensors",
        "checkpoint-000003.safetensors",
        "checkpoint-000005.safetensors",
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
    _, checkpoint, _ = read_checkpoint(tmp_path)
    assert_same(state(model), kept)
    assert_same({name: checkpoint[f"average/{name}"] for name in kept}, kept)
    name = "head.classification_head.cls_logits.weight"
    assert (kept[name] != checkpoint[f"model/{name}"]).any()


def test_without_checkpoints_there_is_one_at_the_end(tmp_path):
    fit(tmp_path, RUN.replace(steps=2, save_every=0))
    _, _, metadata = read_checkpoint(tmp_path)
    assert metadata["step"] == "2"


@pytest.mark.parametrize(
    "left",
    [
        ["weights.safetensors"],
        ["best.safetensors"],
        ["metrics.jsonl"],
        ["checkpoint-000003.safetensors"],
        ["config.json", "metrics.jsonl", "checkpoint-000003.safetensors", "weights.safetensors"],
    ],
)
def test_a_folder_that_holds_a_run_is_left_as_it_is(tmp_path, left):
    for name in left:
        (tmp_path / name).write_bytes(b'{"step": 3}\n')
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds a run already; .* --resume .* --out"):
        fit(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_run_that_did_not_start_is_no_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    (tmp_path / "config.json").write_bytes(b"{}")
    fit(tmp_path, RUN.replace(steps=1))
    assert checkpoints(tmp_path) == [1]


def test_weights_are_written_with_every_checkpoint(tmp_path, monkeypatch):
    stop_at(monkeypatch, 4)
    with pytest.raises(Stop):
        fit(tmp_path, RUN.replace(ema=0.9))
    kept, config = load_weights(tmp_path / "weights.safetensors")
    assert checkpoints(tmp_path) == [3] and config == CONFIG
    found, config = load_weights(tmp_path / "checkpoint-000003.safetensors")
    assert_same(found, kept)
    assert config == CONFIG


def scripted(monkeypatch, aps):
    """Evaluations find these APs."""
    values = iter(aps)

    def evaluated(*_):
        ap = next(values)
        return {"AP": ap, "AP50": ap}, []

    monkeypatch.setattr(loop, "evaluate_model", evaluated)


def test_the_best_weights_are_kept_beside_the_last(tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, [0.2, 0.4, 0.3])
    seen = []
    run = RUN.replace(eval_every=2, save_every=2, keep=9, learning_rate=1e-2)
    fit(tmp_path, run, validation=shapes("val", 2), callbacks=[lambda *call: seen.append(call)])
    best, last = (load_weights(tmp_path / f"{name}.safetensors")[0] for name in ("best", "weights"))
    assert_same(best, load_weights(tmp_path / "checkpoint-000004.safetensors")[0])
    assert_same(last, load_weights(tmp_path / "checkpoint-000006.safetensors")[0])
    assert load_weights(tmp_path)[0].keys() == best.keys()
    assert_same(load_weights(tmp_path)[0], best)
    assert seen == [(line["step"], line) for line in lines(tmp_path)] and len(seen) == 6
    told = [line for line in capsys.readouterr().err.splitlines() if "AP" in line]
    assert told == [
        "step 2: AP 0.200, AP50 0.200",
        "step 4: AP 0.400, AP50 0.400",
    ]


def test_where_no_ap_can_be_measured_the_last_weights_are_the_best(tmp_path, monkeypatch):
    scripted(monkeypatch, [math.nan, math.nan, math.nan])
    fit(tmp_path, RUN.replace(eval_every=2), validation=shapes("val", 2))
    best, last = (load_weights(tmp_path / f"{name}.safetensors")[0] for name in ("best", "weights"))
    assert_same(best, last)


def test_patience(tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, [0.1, 0.3, 0.3, 0.2])
    run = RUN.replace(steps=9, eval_every=1, patience=2, log_every=1)
    fit(tmp_path, run, validation=shapes("val", 2))
    assert [x["step"] for x in lines(tmp_path) if x["kind"] == "eval"] == [1, 2, 3, 4]
    assert checkpoints(tmp_path) == [3, 4]
    assert "stopped: no better AP in the last 2 steps" in capsys.readouterr().err
    before = lines(tmp_path)
    fit(tmp_path, run, validation=shapes("val", 2), resume=True)  # and it stays so
    assert lines(tmp_path) == before
    assert "stopped: no better AP in the last 2 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "validation"), [(RUN.replace(patience=1), True), (RUN.replace(eval_every=1), False)]
)
def test_patience_without_evaluations(tmp_path, run, validation):
    run = run.replace(patience=1)
    with pytest.raises(ValueError, match="train: patience needs eval_every > 0 and a validation"):
        fit(tmp_path, run, validation=shapes("val", 2) if validation else None)


def test_off_a_terminal_there_is_a_line_every_so_often(tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    for seconds, expected in ((15.0, [1, 3, 5, 6]), (1e9, [1, 6])):
        monkeypatch.setattr(progress, "LINE_SECONDS", seconds)
        with progress.Progress(6, 0) as shown:
            for step in range(1, 7):
                shown.update()
                shown.show(step, "loss 1")
        found = capsys.readouterr().err.splitlines()
        assert found == [f"step {step} of 6: loss 1" for step in expected]
    with progress.Progress(6, 0, shown=False) as hidden:
        hidden.update()
        hidden.show(1, "loss 1")
        hidden.say("more")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("keep", "expected"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_last_checkpoints_are_kept(tmp_path, keep, expected):
    fit(tmp_path, RUN.replace(steps=5, save_every=1, keep=keep))
    assert checkpoints(tmp_path) == expected


# Going on


def test_the_same_run_writes_the_same_bytes(tmp_path):
    for name in "ab":
        fit(tmp_path / name, RUN.replace(steps=1))
    first, second = ((tmp_path / name / "weights.safetensors").read_bytes() for name in "ab")
    assert first == second


class Stop(Exception):
    pass


def stop_at(monkeypatch, step):
    """The step with this number fails."""
    whole = Trainer.step

    def short(self, number, batch, rate):
        if number == step:
            raise Stop
        return whole(self, number, batch, rate)

    monkeypatch.setattr(Trainer, "step", short)


AUGMENTED = RUN.replace(crop=(48, 56), zoom=(0.8, 1.25), flips="d4", jitter=0.2)


@pytest.mark.parametrize(
    ("run", "config"),
    [
        (RUN, CONFIG),
        (RUN.replace(optimizer="sgd", workers=1, eval_every=2), CONFIG),
        (AUGMENTED.replace(ema=0.9, schedule="cosine", clip_norm=1.0), CONFIG),
        (RUN.replace(ema=0.99), CONFIG.replace(normalizer="ema", norm="group")),
    ],
    ids=["adamw", "sgd", "augmented", "running means"],
)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path, monkeypatch, run, config):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    validation = shapes("val", 2) if run.eval_every else None
    fit(whole, run, config, validation=validation)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)  # the checkpoint is of step 3; line 4 of the metrics is written
        with pytest.raises(Stop):
            fit(stopped, run, config, validation=validation)
    fit(stopped, run, config, validation=validation, resume=True)
    assert_same_run(stopped, whole)


def assert_same_run(found, expected):
    """Weights, checkpoint and metrics are equal bit for bit, apart from the clock."""
    weights, others = ((x / "weights.safetensors").read_bytes() for x in (found, expected))
    assert weights == others
    assert_same(read_checkpoint(found)[1], read_checkpoint(expected)[1])
    clock = ("images_per_second", "seconds")
    rows, others = (
        [{k: v for k, v in x.items() if k not in clock} for x in lines(out)]
        for out in (found, expected)
    )
    assert rows == others


def test_an_evaluation_that_was_stopped_is_done_when_the_run_goes_on(tmp_path, monkeypatch):
    whole, stopped, validation = tmp_path / "whole", tmp_path / "stopped", shapes("val", 2)
    run = RUN.replace(eval_every=3)
    fit(whole, run, validation=validation)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_model", lambda *_: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            fit(stopped, run, validation=validation)
    assert checkpoints(stopped) == [3] and [x["kind"] for x in lines(stopped)] == ["train"]
    fit(stopped, run, validation=validation, resume=True)
    assert_same_run(stopped, whole)


def test_going_on_after_the_end_changes_nothing(tmp_path):
    validation = shapes("val", 2)
    first = fit(tmp_path, validation=validation)
    before = lines(tmp_path)
    second = fit(tmp_path, validation=validation, resume=True)
    assert_same(first.state_dict(), second.state_dict())
    assert lines(tmp_path) == before and len(before) == 4


def test_a_run_killed_while_it_removed_checkpoints(tmp_path):
    run = RUN.replace(steps=3, save_every=1, keep=2)
    fit(tmp_path, run.replace(keep=3))
    fit(tmp_path, run, resume=True)
    assert checkpoints(tmp_path) == [2, 3]


@pytest.mark.parametrize("left", [0, 5, -9])
def test_the_newest_checkpoint_that_is_whole_is_taken(tmp_path, caplog, left):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    fit(whole)
    shutil.copytree(whole, damaged)
    path = damaged / "checkpoint-000006.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with caplog.at_level(logging.INFO, "focal"):
        fit(damaged, resume=True)
    cut, going_on = (record.getMessage() for record in caplog.records)
    assert f"{path}: expected a whole saf" in cut
    assert cut.endswith("; taking checkpoint-000003.safetensors")
    assert going_on == f"resuming from {damaged / 'checkpoint-000003.safetensors'}, after step 3"
    assert_same_run(damaged, whole)


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_no_checkpoint_is_whole(tmp_path):
    fit(tmp_path)
    for path in tmp_path.glob("checkpoint-*"):
        path.write_bytes(path.read_bytes()[:-1])
    before = snapshot(tmp_path)
    with pytest.raises(
        ValueError, match=r"^\S+6\.safetensors: expected a whole .*3\.safetensors: "
    ):
        fit(tmp_path, resume=True)
    assert snapshot(tmp_path) == before


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path, monkeypatch):
    run = RUN.replace(keep=1, save_every=4)
    fit(tmp_path, run.replace(keep=2, steps=8, save_every=2))
    (tmp_path / "checkpoint-000008.safetensors").write_bytes(b"")
    stop_at(monkeypatch, 7)
    with pytest.raises(Stop):
        fit(tmp_path, run.replace(steps=9, save_every=7), resume=True)
    assert checkpoints(tmp_path) == [7, 8]


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fit(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stop):
            fit(stopped)
    assert checkpoints(stopped) == [] and len(lines(stopped)) == 1
    fit(stopped, resume=True)
    assert_same_run(stopped, whole)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint-\*\.safetensors; found no"):
        fit(tmp_path, resume=True)


def test_weights_are_no_checkpoint(tmp_path):
    fit(tmp_path, RUN.replace(steps=1))
    (tmp_path / "weights.safetensors").rename(tmp_path / "checkpoint-000001.safetensors")
    with pytest.raises(ValueError, match=r"expected format 'focal\.checkpoint'"):
        fit(tmp_path, resume=True)


def test_a_checkpoint_from_beyond_the_end(tmp_path):
    fit(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"06\.safetensors: is of step 6, and the run has 5 steps"):
        fit(tmp_path, RUN.replace(steps=5), resume=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_killed_process_was_writing_is_removed(tmp_path, resume):
    if resume:
        fit(tmp_path)
    (tmp_path / ".weights.safetensors.123.partial").write_bytes(b"half")
    fit(tmp_path, resume=resume)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"optimizer": "sgd"}, CONFIG, "another optimizer; expected sgd, found adamw"),
        ({"ema": None}, CONFIG, "another ema; expected off, found on"),
        ({}, CONFIG.replace(classes=("a", "b", "c")), "shapes/train has the classes .*'circle'"),
        ({}, CONFIG.replace(channels=8), "weights are not those of this network"),
        ({"seed": 1}, CONFIG, "another seed; expected 1, found 0"),
        ({"freeze": 2}, CONFIG, "another freeze; expected 2, found 0"),
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
        with pytest.raises(Stop):
            fit(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    fit(tmp_path, resume=True)
    assert [x["step"] for x in lines(tmp_path)] == [2, 4, 6]


# Being told to stop


def signal_at(monkeypatch, step, *numbers):
    """These signals come during the step with this number."""
    whole = Trainer.step

    def signaled(self, number, batch, rate):
        if number == step:
            for n in numbers:
                signal.raise_signal(n)
        return whole(self, number, batch, rate)

    monkeypatch.setattr(Trainer, "step", signaled)


@pytest.fixture
def sigint():
    """SIGINT as Python has it: a shell has it ignored in what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(tmp_path, monkeypatch, number):
    whole, stopped, validation = tmp_path / "whole", tmp_path / "stopped", shapes("val", 2)
    run = RUN.replace(eval_every=2, save_every=0)
    fit(whole, run, validation=validation)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        signal_at(patch, 3, number)  # it is the fourth, and would be evaluated
        with pytest.raises(Stopped) as stop:
            fit(stopped, run, validation=validation)
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    path = stopped / "checkpoint-000004.safetensors"
    name = signal.Signals(number).name
    assert str(stop.value) == f"stopped by {name} after step 4 of 6; {path} is saved"
    assert stop.value.signal == number and isinstance(stop.value, KeyboardInterrupt)
    assert lines(stopped)[-1]["kind"] == "train" and lines(stopped)[-1]["step"] == 4
    fit(stopped, run, validation=validation, resume=True)
    assert_same_run(stopped, whole)


@pytest.mark.parametrize("step", [4, 6])
def test_a_signal_stops_an_evaluation(tmp_path, monkeypatch, step):
    whole, stopped, validation = tmp_path / "whole", tmp_path / "stopped", shapes("val", 2)
    run = RUN.replace(eval_every=4, save_every=0)
    fit(whole, run, validation=validation)
    evaluate_model = loop.evaluate_model

    def signaled(*arguments):
        if lines(stopped)[-1]["step"] == step:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("it went on")
        return evaluate_model(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_model", signaled)
        with pytest.raises(Stopped, match=f"stopped by SIGTERM after step {step} of 6"):
            fit(stopped, run, validation=validation)
    fit(stopped, run, validation=validation, resume=True)
    assert_same_run(stopped, whole)


@pytest.mark.usefixtures("sigint")
def test_a_signal_before_the_first_step_stops_the_run(tmp_path, monkeypatch):
    """While a framework starts, an exception could be lost in its callbacks."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    fit(whole)
    with Signals() as signals, pytest.raises(Stopped, match="stopped by SIGINT after step 0 of 6"):
        signal.raise_signal(signal.SIGINT)
        fit(stopped, signals=signals)
    assert checkpoints(stopped) == [0]
    fit(stopped, resume=True)
    assert_same_run(stopped, whole)


@pytest.mark.usefixtures("sigint")
def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    signal_at(monkeypatch, 4, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stop:
        fit(tmp_path)
    assert not isinstance(stop.value, Stopped)
    assert checkpoints(tmp_path) == [3]


def test_ignored_signals_stay_ignored(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        signal_at(monkeypatch, 1, signal.SIGINT)
        fit(tmp_path)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_a_thread_it_trains_without_the_signals(tmp_path):
    thread = threading.Thread(target=fit, args=(tmp_path,))
    thread.start()
    thread.join()
    assert checkpoints(tmp_path) == [3, 6]


# What can go wrong with the data


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_example_that_fails_ends_the_run_and_its_threads(tmp_path, split):
    class Faulty(ShapesDataset):
        def __getitem__(self, index):
            if index == 3:
                raise RuntimeError("the disk is gone")
            return super().__getitem__(index)

    faulty = Faulty(split, size=(64, 64), num_images=4)
    before = set(threading.enumerate())
    options = {"data": faulty} if split == "train" else {"validation": faulty}
    with pytest.raises(ValueError, match=rf"^shapes/{split}: 4\.png: cannot be used \(RuntimeErr"):
        fit(tmp_path, RUN.replace(workers=2, eval_every=2), **options)
    assert set(threading.enumerate()) == before and not multiprocessing.active_children()


# Disks


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, call):
    fit(tmp_path, RUN.replace(steps=3))
    before = snapshot(tmp_path)
    write = RunFolder.save_checkpoint

    def full(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, no_space)
            return write(*arguments)

    monkeypatch.setattr(RunFolder, "save_checkpoint", full)
    with pytest.raises(
        OSError, match="No space left on device; what was there before is untou"
    ) as e:
        fit(tmp_path, resume=True)
    assert e.value.filename == str(tmp_path / "checkpoint-000006.safetensors")
    after = snapshot(tmp_path)
    assert after.keys() == before.keys()
    for name in ("checkpoint-000003.safetensors", "weights.safetensors"):
        assert after[name] == before[name]
    monkeypatch.undo()
    fit(tmp_path, resume=True)
    assert checkpoints(tmp_path) == [3, 6]


# Numbers that go wrong


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_step_that_is_not_finite_changes_nothing(optimizer, clip_norm):
    run = RUN.replace(optimizer=optimizer, clip_norm=clip_norm, ema=0.9)
    trainer, batch = trainer_and_batch(run, CONFIG.replace(normalizer="ema"))
    parts = trainer.step(0, batch, 1e-3)
    assert trainer.healthy and 0 < parts["gradient_norm"] < math.inf
    spoilt = trainer.state()
    spoilt["model/head.classification_head.cls_logits.bias"][:] = 1e38
    trainer.load_state(spoilt)
    for number in (1, 2):  # nor does any step after it
        parts = trainer.step(number, batch, 1e-3)
        assert not trainer.healthy and not parts["loss"].isfinite()
        assert_same(trainer.state(), spoilt)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    run = RUN.replace(learning_rate=1e30, steps=20, log_every=20, save_every=2, warmup=0)
    fine = RUN.replace(steps=2)
    fit(tmp_path, fine)
    with pytest.raises(FloatingPointError) as error:
        fit(tmp_path, run, resume=True)
    text = str(error.value)
    assert text.startswith("step 4: ")  # step 3 was still finite, and made the weights enormous
    assert "not finite (classification" in text and "gradient_norm nan" in text
    ids = next(train_batches(shapes(), CONFIG, run, start=3)).image_ids
    assert f"images with the ids {', '.join(map(str, ids))}; the step was not taken" in text
    assert text.endswith(f"{tmp_path / 'checkpoint-000003.safetensors'} is the state before it")
    assert checkpoints(tmp_path) == [2, 3]
    _, tensors, metadata = read_checkpoint(tmp_path)
    assert metadata["step"] == "3" and all(np.isfinite(x).all() for x in tensors.values())
    assert [x["step"] for x in lines(tmp_path)] == [2]


def test_a_first_loss_that_is_not_finite_names_the_part(tmp_path):
    start = state(build(CONFIG, device="cpu"))
    start["head.regression_head.bbox_reg.bias"][:] = math.inf
    with pytest.raises(FloatingPointError, match=r"^step 1: box not finite \(class"):
        fit(tmp_path, initial=start)
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize("normalizer", ["batch", "image", "ema"])
def test_the_first_loss_is_the_one_to_expect(tmp_path, caplog, normalizer):
    config = CONFIG.replace(normalizer=normalizer)
    batch = next(train_batches(shapes(), config, RUN))
    fit(tmp_path, RUN.replace(log_every=1, steps=1), config)
    expected = first_loss(batch.boxes, batch.labels, (64, 64), config)
    assert lines(tmp_path)[0]["classification"] == pytest.approx(expected, rel=0.05)
    assert caplog.records == []


def test_a_missing_prior_bias_is_told_once(tmp_path, caplog, monkeypatch):
    whole = backend_torch.build

    def without_bias(*arguments):
        model = whole(*arguments)
        torch.nn.init.zeros_(model.head.classification_head.cls_logits.bias)
        return model

    monkeypatch.setattr(backend_torch, "build", without_bias)
    start = state(without_bias(CONFIG, 0, "cpu"))
    fit(tmp_path / "a")
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "Is the prior bias missing" in record.getMessage()
    fit(tmp_path / "a", resume=True)  # not on going on, nor with weights of one's own
    fit(tmp_path / "b", RUN.replace(steps=1), initial=start)
    assert [x for x in caplog.records if x.levelname == "WARNING"] == [record]
