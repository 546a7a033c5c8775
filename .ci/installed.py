"""Run by the Python of an environment that has the wheel and what it needs, and nothing else."""

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np

import focal
import focal.numpy
import focal.testing

EXTRAS = ["torch", "jax", "tensorflow", "keras", "PIL", "matplotlib", "safetensors"]

assert Path(focal.__file__).is_relative_to(sys.prefix), focal.__file__
present = {distribution.name for distribution in importlib.metadata.distributions()}
assert present <= {"focal-losses", "numpy", "pip", "setuptools"}, present
assert not [name for name in EXTRAS if importlib.util.find_spec(name)]
assert importlib.metadata.version("focal-losses") == focal.__version__

assert focal.prior_bias(0.01) == -4.59511985013459
loss = focal.numpy.sigmoid_focal_loss(np.array([-100.0, 0.0]), np.ones(2), alpha=None)
assert np.allclose(loss, [100, np.log(2) / 4], rtol=1e-15)
assert focal.testing.check_loss(focal.numpy.sigmoid_focal_loss, backend="numpy").passed

command = Path(sys.executable).with_name("focal")
for arguments, status, said in [
    (["--version"], 0, f"focal {focal.__version__}\n"),
    (["prior-bias", "0.1"], 0, f"{focal.prior_bias(0.1)}\n"),
    (["check", "."], 2, "focal: tqdm is not installed; install it with"),
]:
    done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status, done
    assert (done.stdout + done.stderr).startswith(said), done
    assert "Traceback" not in done.stderr

print(f"focal {focal.__version__} from {focal.__file__}: good with NumPy {np.__version__} alone")
