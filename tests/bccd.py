"""The blood cell images, which lie beside a checkout and not in it."""

from pathlib import Path

import pytest

BCCD = Path(__file__).resolve().parents[2] / "shared/data/bccd"
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD images are not here")
