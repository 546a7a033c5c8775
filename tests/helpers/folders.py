"""Where things are: the project, its tests, and real images."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
BCCD = TESTS / "data/bccd"
"""16 blood cell images in COCO format."""
WHOLE_BCCD = ROOT.parent / "shared/data/bccd"
"""All 364 of them, which may lie beside a checkout."""
