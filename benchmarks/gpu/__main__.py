"""All measurements on a GPU: `python -m benchmarks.gpu --out FOLDER`.

Each part writes FOLDER/PART.json after every measurement and stops when its minutes are over.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.gpu import page
from benchmarks.gpu.results import NOT_REACHED, Job, Report
from benchmarks.gpu.worker import AGAIN

ROOT = Path(__file__).resolve().parents[2]
PARTS = {
    "tests": ("benchmarks.gpu.tests", "benchmarks.gpu.kernels"),
    "losses": ("benchmarks.gpu.losses", "benchmarks.gpu.losses_jax"),
    "train-torch": ("benchmarks.gpu.train_torch",),
    "train-jax": ("benchmarks.gpu.train_jax",),
    "agree": ("benchmarks.gpu.agree",),
    "paper": ("benchmarks.gpu.paper",),
    "tensorflow": ("benchmarks.gpu.on_tensorflow",),
}
GRACE = 15
"""Seconds after its minutes when a part is killed."""


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 1 if a measurement failed."""
    options = _parser().parse_args(arguments)
    if options.data is not None and not options.data.is_dir():
        sys.exit(f"benchmarks.gpu: --data {options.data} is not a folder")
    gpu = {"name": "none: a dry run on a CPU"} if options.dry else describe_gpu()
    options.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.gpu", *(arguments or sys.argv[1:])])
    reports = []
    with tempfile.TemporaryDirectory() as scratch:
        for part in dict.fromkeys(options.part):
            head = {
                "part": part,
                "command": command,
                "date": datetime.now().astimezone().isoformat(timespec="seconds"),
                "minutes": options.minutes,
                "dry": options.dry,
                "machine": machine(),
                "gpu": gpu,
            }
            report = Report.start(options.out / f"{part}.json", **head)
            reports.append(run_part(part, report, options, Path(scratch)))
    print()
    for report in reports:
        print(page.summary(report.content), flush=True)
    return int(any(report.content["failed"] for report in reports))


def run_part(part: str, report: Report, options: argparse.Namespace, scratch: Path) -> Report:
    """All stages of a part, each in its own process."""
    print(f"{part}, at most {options.minutes:g} minutes", flush=True)
    begin = time.time()
    end = begin + 60 * options.minutes
    for stage in PARTS[part]:
        job = Job(stage, report, end, options.out, scratch, options.data, options.dry)
        while (status := run_stage(job)) == AGAIN:
            pass
        report = Report.read(report.path)
        if status is None:
            report.content["left_out"].setdefault(stage, NOT_REACHED)
        elif status != 0:
            report.fail(
                stage, f"the process ended with status {status} before its first measurement"
            )
    late = any(why.startswith(NOT_REACHED) for why in report.content["left_out"].values())
    report.write(state="out of time" if late else "done", seconds=round(time.time() - begin, 1))
    return report


def run_stage(job: Job) -> int | None:
    """The exit status of a stage; None if there was no time to start it."""
    if job.seconds_left() <= 0:
        return None
    command = [sys.executable, "-m", "benchmarks.gpu.worker", job.to_json()]
    try:
        status = subprocess.run(
            command, env=_environment(job), timeout=job.seconds_left() + GRACE
        ).returncode
    except subprocess.TimeoutExpired:
        report = Report.read(job.report.path)
        if (name := report.content["running"]) is not None:
            report.content["left_out"][name] = f"{NOT_REACHED}: stopped when the time was over"
        report.write(running=None)
        return 0
    report = Report.read(job.report.path)
    name = report.content["running"]
    if status in (0, AGAIN) or name is None:
        return status
    print(f"  FAILED, the process ended with status {status}: {name}", flush=True)
    report.content["running"] = None
    report.fail(name, f"the process ended with status {status}")
    return AGAIN


def _environment(job: Job) -> dict[str, str]:
    """The environment of a stage."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    added = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        # JAX would take most of the memory of the GPU at once, and its peak would say nothing.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TQDM_MININTERVAL": "30",
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
    }
    if job.dry:
        added |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"}
    else:
        # A run with another number of steps is compiled again, to the same program.
        added["JAX_COMPILATION_CACHE_DIR"] = str(job.scratch / "jax")
    return {**os.environ, **added}


def describe_gpu() -> dict[str, Any]:
    """The GPU that PyTorch sees; the command ends where there is none."""
    try:
        import torch
    except ImportError:
        sys.exit("benchmarks.gpu: PyTorch is not installed; nothing was measured")
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks.gpu: PyTorch sees no CUDA GPU on this machine; nothing was measured "
            "(--dry runs the same code on a CPU, in small sizes)"
        )
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "count": torch.cuda.device_count(),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--part", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="NAME",
        help=f"which parts, in this order (default: all): {', '.join(PARTS)}",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=9.0, help="for each part (default: 9)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data", type=Path, help="folder in the COCO format; default: shapes")
    parser.add_argument("--dry", action="store_true", help="on a CPU, in small sizes")
    return parser


if __name__ == "__main__":
    # So that SIGTERM ends the stage as well.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
