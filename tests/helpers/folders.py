"""Where things are: the project, its tests, and a data set that lies beside a checkout."""

from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
BCCD = ROOT.parent / "shared/data/bccd"
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD images are not here")
