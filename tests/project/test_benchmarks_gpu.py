"""`python -m benchmarks.gpu`: what it writes when all goes well, fails, is killed, takes long."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from folders import BCCD, ROOT
from triton_process import compile_without_a_gpu, needs_triton

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

from benchmarks import pages  # noqa: E402
from benchmarks.common import RESULTS  # noqa: E402
from benchmarks.gpu import __main__ as command  # noqa: E402
from benchmarks.gpu import agree, detections, page  # noqa: E402

STAGE = """
import os, time
from benchmarks.gpu.results import LeftOut

def fails():
    raise ValueError("a wrong number")

def needs():
    raise LeftOut("no such device")

def plan(job):
    return {
        "first": lambda: {"process": os.getpid(), "bad": float("inf")},
        "fails": fails,
        "aborts": os.abort,
        "needs": needs,
        "last": os.getpid,
    }
"""
SLOW = """
import time

def plan(job):
    return {"first": lambda: 1, "slow": lambda: time.sleep(600), "never": lambda: 2}
"""


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Adds a part with one stage, of this source."""

    def add(source: str) -> None:
        (tmp_path / "made_up_stage.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setitem(command.PARTS, "made-up", ("made_up_stage",))

    return add


def run(out, *arguments):
    """The exit status, and the results of the part."""
    status = command.main(["--dry", "--part", "made-up", "--out", str(out), *arguments])
    return status, json.loads((out / "made-up.json").read_text())


def test_a_failure_is_recorded_and_the_rest_goes_on(stage, tmp_path, capfd):
    stage(STAGE)
    status, found = run(tmp_path / "out")
    assert status == 1 and found["state"] == "done" and found["running"] is None
    assert list(found["measured"]) == ["first", "last"]
    assert found["measured"]["first"]["bad"] == "inf"  # JSON has no infinity
    # What comes after a failure is measured in another process.
    assert found["measured"]["last"] != found["measured"]["first"]["process"]
    assert found["left_out"] == {"needs": "no such device"}
    assert found["failed"]["fails"]["error"] == "ValueError: a wrong number"
    assert 'raise ValueError("a wrong number")' in "".join(found["failed"]["fails"]["traceback"])
    assert found["failed"]["aborts"]["error"] == f"the process ended with status {-signal.SIGABRT}"
    printed = capfd.readouterr().out
    assert "2 measured, 2 failed, 1 left out" in printed and "FAILED fails: ValueError" in printed


@pytest.mark.parametrize("source", ["import no_such_package", "def plan(job): return 1 / 0"])
def test_a_stage_that_cannot_start(stage, tmp_path, source):
    stage(source)
    status, found = run(tmp_path / "out")
    assert status == 1 and list(found["failed"]) == ["made_up_stage"]


def test_the_time_is_over(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "GRACE", 0)
    stage(SLOW)
    status, found = run(tmp_path / "out", "--minutes", "0.15")
    assert status == 0 and found["state"] == "out of time"
    assert found["measured"] == {"first": 1} and not found["failed"]
    assert found["left_out"]["slow"].startswith("not reached")
    assert found["left_out"]["never"] == "not reached"


@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
def test_a_kill_loses_nothing_that_was_measured(stage, tmp_path):
    stage(SLOW)
    out = tmp_path / "out"
    code = (
        "import benchmarks.gpu.__main__ as m; m.PARTS['made-up'] = ('made_up_stage',);"
        f"m.main(['--dry', '--part', 'made-up', '--out', {str(out)!r}])"
    )
    paths = os.pathsep.join((str(ROOT), str(tmp_path)))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(600):
            path = out / "made-up.json"
            if path.is_file() and json.loads(path.read_text())["running"] == "slow":
                break
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found = json.loads(path.read_text())
    assert found["state"] == "running" and found["running"] == "slow"
    assert found["measured"] == {"first": 1}
    assert found["left_out"] == {"slow": "not reached", "never": "not reached"}


def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no CUDA GPU on this machine; nothing was measured"):
        command.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


EXPECTED = {
    "tests": {"pytest tests/gpu", "every bfloat16", "float32, hard, gamma 2"},
    "losses": {"float32, dense, both", "bfloat16, sparse, backward", "NaN gradients"},
    "train-torch": {"step", "profile", "speed with the loader", "training"},
    "train-jax": {"step", "speed with the loader", "training"},
    "agree": {"torch, cpu", "jax, cpu"},
    "paper": {"FL 2 .25, seed 0", "CE .5, seed 0"},
    "tensorflow": {"float32, dense", "outputs"},
}
PACKAGES = {"tests": "triton", "train-jax": "flax", "agree": "jax", "tensorflow": "tensorflow"}
HEAD = {"part", "command", "date", "minutes", "dry", "machine", "gpu", "versions", "state"}


def test_a_dry_run_writes_every_part(tmp_path, quick_jax):
    for part, package in PACKAGES.items():
        pytest.importorskip(package, reason=f"for the part {part}")
    out = tmp_path / "out"
    # The environment of a machine where the project is not installed.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(out), "--data", str(BCCD)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert {p.name for p in out.iterdir()} == {f"{p}.json" for p in EXPECTED} | {"profile.txt"}
    assert "Self CPU" in (out / "profile.txt").read_text()
    summary = done.stdout[done.stdout.index("== tests") :]
    assert len(summary) < 12_000  # characters, a few screens
    for part, names in EXPECTED.items():
        found = json.loads((out / f"{part}.json").read_text())
        assert names <= found["measured"].keys() and HEAD <= found.keys()
        assert found["state"] == "done" and not found["failed"]
        assert found["versions"]["focal"]
        assert f"== {part}: done" in summary
    check_numbers({p: json.loads((out / f"{p}.json").read_text())["measured"] for p in EXPECTED})

    # The page has a place for each part, and AP is that of the detections.
    report = json.loads((out / "train-torch.json").read_text())
    ap = report["measured"]["training"]["AP"]
    report["measured"]["training"]["AP"] = detections.WITHOUT
    (out / "train-torch.json").write_text(json.dumps(report))
    copy = tmp_path / "gpu.md"
    copy.write_text(page.PAGE.read_text())
    page.main(["--results", str(out), "--page", str(copy), "--data", str(BCCD)])
    assert json.loads((out / "train-torch.json").read_text())["measured"]["training"]["AP"] == ap
    filled = copy.read_text()
    assert page.EMPTY not in filled
    assert "| usual Triton kernel | " in filled and "One checkpoint" in filled


def check_numbers(measured):
    """A few, each of another part."""
    losses = measured["losses"]["float32, dense, both"]["sides"]
    assert losses["focal"]["median_ms"] > 0 and "usual Triton kernel" in losses
    nan = measured["losses"]["NaN gradients"]
    assert nan["focal"]["gamma 0"] == 0 < nan["usual Triton kernel"]["gamma 0"]
    for part in ("train-torch", "train-jax"):
        run = measured[part]["training"]
        assert run["steps"] == len(run["log"]) == 3
        assert len(detections.unpack(run["detections"])) == len(
            json.loads((BCCD / "instances_test.json").read_text())["images"]
        )
    assert measured["agree"]["jax, cpu"]["matched"] == 1.0
    assert 0 < measured["agree"]["jax, cpu"]["logits"] < 1e-4
    assert measured["tensorflow"]["outputs"]["matched"] == 1.0


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from benchmarks.gpu import usual_kernel

assert usual_kernel.COMPILED
constants = {"COMPILED": True, "BLOCK": usual_kernel.BLOCK}
types = {"n": "i32", "alpha": "fp32", "gamma": "fp32", "total": "*fp32", "upstream": "*fp32"}
for kernel in (usual_kernel._forward, usual_kernel._backward):
    for operand in ("*fp32", "*bf16"):
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types.get(n, operand) for n in names}
        values = {(i,): constants[n] for i, n in enumerate(names) if n in constants}
        source = ASTSource(kernel, signature, values)
        assert "pow" in compile(source, GPUTarget("cuda", 90, 32)).asm["ttir"]
print("compiled")
"""


@needs_triton
def test_the_usual_kernel_compiles_without_a_gpu(tmp_path):
    """With `pow` of CUDA's library, which the interpreter lacks."""
    compile_without_a_gpu(COMPILE, tmp_path)


def test_the_page_shows_the_committed_results():
    results = {path.stem: path.read_text() for path in sorted((RESULTS / "gpu").glob("*.json"))}
    text = page.PAGE.read_text()
    assert pages.fill(text, {p: page.text(json.loads(r)) for p, r in results.items()}) == text
    assert text.count(page.EMPTY) == len(command.PARTS) - len(results)


def test_the_counts_on_the_pages_are_those_of_the_results():
    traffic, instructions = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("traffic", "instructions")
    )
    text = page.PAGE.read_text()
    row = "| | now | **{launches:,}** | **{gigabytes:.0f}** | **{waits}** | {peak_gib} |"
    assert all(row.format(**found) in text for found in traffic["norms"].values())
    row = "alone launches {} operations, and post-processing of the 16 images {}."
    assert row.format(*(found["launches"] for found in traffic["parts"].values())) in text

    text = (ROOT / "docs/benchmarks.md").read_text()
    for short, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
        for kind, targets in (("dense", dtype), ("sparse", "labels")):
            found = instructions["per_logit"][f"{short} {kind} sum and slope, gamma 2.0"]
            figures = f"{found['bytes']} | {found['all']} | {found['inferred share of copy']:.0%}"
            assert f"| {dtype} | {targets} | {figures} |" in text


def test_detections_are_packed_without_loss():
    rng = np.random.default_rng(0)
    found = [
        {
            "image_id": image,
            "boxes": rng.random((count, 4)).astype(np.float32),
            "scores": rng.random(count).astype(np.float32),
            "labels": rng.integers(0, 3, count),
        }
        for image, count in ((7, 3), (2, 0), (9, 1))
    ]
    again = detections.unpack(detections.pack(found))
    assert [entry["image_id"] for entry in again] == [7, 2, 9]
    for a, b in zip(found, again, strict=True):
        for key in ("boxes", "scores", "labels"):
            np.testing.assert_array_equal(a[key], b[key])
    assert detections.unpack(detections.pack([])) == []


def test_a_detection_is_matched_by_label_score_and_corners():
    one = {
        "boxes": np.array([[0, 0, 10, 10], [5, 5, 9, 9], [1, 1, 2, 2]], np.float32),
        "scores": np.array([0.9, 0.8, 0.7], np.float32),
        "labels": np.array([0, 1, 2]),
    }
    np.testing.assert_array_equal(agree.matched(one, one), np.zeros(3))
    other = {
        "boxes": one["boxes"] + np.array([[0.25], [0], [0]], np.float32),
        "scores": one["scores"] + np.array([0, 0.01, 0], np.float32),
        "labels": np.array([0, 1, 1]),
    }
    np.testing.assert_array_equal(agree.matched(one, other), [0.25])
    empty = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0)}
    assert len(agree.matched(empty, one)) == len(agree.matched(one, empty)) == 0
