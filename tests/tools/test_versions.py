"""What docs/versions.md says was tested is what pyproject.toml asks for."""

import json
import re

import pytest
import versions

PAGE = versions.PAGE.read_text()
EXTRAS = ("torch", "jax", "tensorflow", "retinanet")


@pytest.fixture(scope="module")
def record():
    return json.loads(versions.RECORD.read_text())


def test_every_range_is_on_the_page():
    table = re.findall(r"^\| `([\w-]+>=[\d.]+)` \|", PAGE, re.M)
    assert sorted(table) == sorted(versions.ranges(EXTRAS).values())


def test_the_floors_are_what_was_tested(record):
    tested = record["floors"]["packages"]
    for name, requirement in versions.ranges(versions.SETS["floors"].extras).items():
        floor = requirement.partition(">=")[2].split(".")
        assert tested[name].split(".")[: len(floor)] == floor, name
        assert set(tested[name].split(".")[len(floor) :]) <= {"0"}, name


def test_all_sets_passed(record):
    assert list(record) == list(versions.SETS)
    for name, chosen in versions.SETS.items():
        found = record[name]["processes"]
        assert tuple(found) == chosen.processes
        assert all(x["status"] == x["failed"] == 0 < x["passed"] for x in found.values()), name
        assert record[name]["python"].startswith(chosen.python + ".")


def test_the_page_has_the_record(record):
    assert versions.fill(PAGE, {"versions": versions.table(record)}) == PAGE


def test_the_pins_are_within_the_ranges():
    pins = dict(
        re.findall(r"^([\w-]+)==([\d.]+)", (versions.ROOT / "constraints.txt").read_text(), re.M)
    )
    pins["tensorflow"] = pins.pop("tensorflow-cpu")
    for name, requirement in versions.ranges((*EXTRAS, "onnx", "test")).items():
        floor = requirement.partition(">=")[2]
        as_numbers = [[int(x) for x in v.split(".")] for v in (pins[name], floor)]
        assert as_numbers[0] >= as_numbers[1], name


def test_processes_have_their_tests():
    for chosen in versions.SETS.values():
        for process in chosen.processes:
            shared = [] if process == "keras" else versions.COMMON
            least = sum(len(list((versions.ROOT / "tests").glob(x))) for x in shared)
            assert len(list(versions.files(chosen, process))) > least
