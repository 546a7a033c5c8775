"""`python -m benchmarks`: all measurements on the CPU, printed and written as JSON.

One process for each, so that their threads do not meet.
"""

import subprocess
import sys

for name in ("torch", "jax", "tensorflow", "targets"):
    subprocess.run([sys.executable, "-m", f"benchmarks.bench_{name}"], check=True)
