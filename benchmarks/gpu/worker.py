"""One stage of a part, in a process of its own."""

from __future__ import annotations

import importlib
import sys
import traceback

from benchmarks.common import versions
from benchmarks.gpu.results import Job

AGAIN = 75
"""Exit status after a failure: the rest is to be measured in a new process."""


def work(job: Job) -> int:
    """Measure what the stage plans, in order, as long as there is time."""
    report = job.report
    try:
        plan = importlib.import_module(job.stage).plan(job)
    except Exception as error:
        report.fail(job.stage, f"{type(error).__name__}: {error}", traceback.format_exc())
        return 0
    todo = report.expect(plan)
    report.write(versions=report.content.get("versions", {}) | versions())
    failures = len(report.content["failed"])
    for name in todo:
        if job.seconds_left() <= 0:
            return 0
        report.attempt(name, plan[name])
        # An error on a GPU can make every later call in the process fail.
        if len(report.content["failed"]) > failures:
            return AGAIN
    return 0


if __name__ == "__main__":
    sys.exit(work(Job.from_json(sys.argv[1])))
