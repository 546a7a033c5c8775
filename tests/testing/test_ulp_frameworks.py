"""The picture and the table of errors over the logit axis, in docs/numerics.md."""

import re

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from benchmarks import ulp_frameworks as ulp


@pytest.mark.parametrize("backend", ulp.NAMES)
def test_only_the_textbook_loses_its_digits(backend):
    pytest.importorskip(backend)
    found = ulp.errors(backend, ulp.X[::50])
    right = ulp.X[::50] > 17
    for theirs, ours in zip(found["textbook"], found["focal"], strict=True):
        assert (theirs[right] > 2**22).all()
        assert theirs[ulp.X[::50] < 0].max() < 14  # the same formula where it has its digits
        assert ours.max() <= 14

    shown = re.search(rf"^\| {ulp.NAMES[backend]} \| .*", ulp.PAGE.read_text(), re.M)
    assert shown is not None
    numbers = [float(cell.replace(",", "")) for cell in shown[0].split("|")[2:-1]]
    for written, error in zip(numbers, [*found["textbook"], *found["focal"]], strict=True):
        assert error.max() <= written * 1.5
    assert max(numbers[2:]) <= 14


def test_the_picture_has_a_row_for_each_framework():
    errors = {name: (np.ones_like(ulp.X), np.ones_like(ulp.X)) for name in ("textbook", "focal")}
    found = dict.fromkeys(ulp.NAMES, errors)
    assert len(ulp.figure(found).axes) == 2 * len(ulp.NAMES)
    assert ulp.table(found).count("\n| ") == len(ulp.NAMES)
