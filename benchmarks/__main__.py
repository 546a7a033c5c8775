"""`python -m benchmarks`: all measurements on the CPU, printed, written as JSON, and shown.

One process for each, so that their threads do not meet.
"""

import subprocess
import sys

for name in (
    "bench_torch",
    "bench_jax",
    "bench_tensorflow",
    "bench_targets",
    "bench_inference",
    "bench_startup",
    "bench_page",
):
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
