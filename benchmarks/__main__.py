"""`python -m benchmarks`: all measurements on the CPU, printed and written as JSON.

One process for each framework, so that their threads do not meet.
"""

import subprocess
import sys

for framework in ("torch", "jax", "tensorflow"):
    subprocess.run([sys.executable, "-m", f"benchmarks.bench_{framework}"], check=True)
