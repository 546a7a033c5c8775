"""The tests that need a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import Job, Plan

ROOT = Path(__file__).resolve().parents[2]
OUTCOME = re.compile(r"^(tests/\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", re.M)
NOT_COLLECTED = (2, 4)
"""Exit statuses of pytest where no test ran."""
SHARE_OF_TIME = 0.7
"""What is left of the part is for the kernels."""


def plan(job: Job) -> Plan:
    return {"pytest tests/gpu": lambda: run_tests(job)}


def run_tests(job: Job) -> dict[str, Any]:
    """How the tests ended. The part fails with any of them, after their results are recorded."""
    result = run_pytest(job, [])
    if result["status"] in NOT_COLLECTED:
        # A warning of some package, which the suite takes for an error, has kept it from starting.
        result = {"with_warnings_as_errors": result, **run_pytest(job, ["-W", "default"])}
    if result["status"] != 0:
        names = ", ".join(result["failed"]) or "none ran"
        job.report.fail("tests/gpu", f"pytest ended with {result['status']}: {names}")
    return result


def run_pytest(job: Job, more: list[str]) -> dict[str, Any]:
    """One run of pytest; outcomes are known even of one that is stopped."""
    arguments = ["-v", "-p", "no:cacheprovider", "--tb=short", *more, "tests/gpu"]
    if job.dry:  # Triton's interpreter is slow, and the rest needs a GPU
        arguments += ["-k", "any_number_of_logits"]
    path = job.scratch / "pytest.txt"
    with open(path, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *arguments],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        status: int | str
        try:
            status = process.wait(max(1.0, SHARE_OF_TIME * job.seconds_left()))
        except subprocess.TimeoutExpired:
            status = "stopped: out of time"
        finally:
            process.kill()
            process.wait()
    text = path.read_text(encoding="utf-8", errors="replace")
    outcomes = OUTCOME.findall(text)
    failed = [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    return {
        "status": status,
        "outcomes": dict(Counter(outcome for _, outcome in outcomes)),
        "failed": failed,
        "skipped": [name for name, outcome in outcomes if outcome == "SKIPPED"],
        "last_line": (text.splitlines() or [""])[-1],
        "output": "" if status == 0 else text[-20_000:],
    }
