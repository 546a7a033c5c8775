"""The tests of the core, the adapters and the networks with other versions of everything.

`make test-versions` builds a fresh environment for each set under build/versions, runs the tests
of each framework in a process of its own, and writes docs/results/versions.json and the table of
docs/versions.md. `make test-versions SETS=floors` does one set and keeps what is known of the
others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from benchmarks.pages import fill, markdown

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "versions"
RECORD = ROOT / "docs" / "results" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"

COMMON = ("core/*.py", "retinanet/test_objective.py", "retinanet/test_postprocess.py")
FILES = {
    "numpy": (*COMMON, "retinanet/test_weights.py"),
    "torch": (
        *COMMON,
        "torch/test_[!tf]*.py",  # not Triton, and not fake tensors, which are no public interface
        "retinanet/test_torchvision.py",
        "retinanet/test_detector.py",
        "retinanet/test_network.py",
        "retinanet/test_training.py",
    ),
    "jax": (*COMMON, "jax/test_*.py", "retinanet/test_network.py"),
    "tensorflow": (*COMMON, "tensorflow/test_*.py", "retinanet/test_network.py"),
    "keras": ("keras/test_*.py",),  # it has a process for each backend of Keras
}
"""What each process runs. Of the tests that run over all backends it takes those of its own."""
NEEDS = {"retinanet/test_training.py": "pycocotools", "torch/test_export.py": "onnxruntime"}
"""Files that a set without this package leaves out."""
BACKENDS = {"numpy": "numpy,array_api_strict", "keras": ""}
JOBS = 2


class Set(NamedTuple):
    """Versions that are tested together."""

    about: str
    python: str
    processes: tuple[str, ...]
    extras: tuple[str, ...]
    pins: tuple[str, ...] = ()
    """Instead of what the extras ask for, or besides."""
    without: tuple[str, ...] = ()
    lowest: bool = False
    """Every requirement at the lowest version of its range."""


SETS = {
    "floors": Set(
        "the lowest versions",
        "3.11",
        ("numpy", "torch", "jax", "tensorflow", "keras"),
        ("torch", "jax", "tensorflow", "retinanet", "test"),
        lowest=True,
    ),
    "gpu-image": Set(
        "GPU images",
        "3.12",
        ("numpy", "torch", "jax"),
        ("torch", "jax", "retinanet", "test"),
        pins=("torch~=2.11.0", "jax~=0.11.0"),
        without=("pycocotools",),
    ),
    "newest": Set(
        "the newest versions",
        "3.13",
        ("numpy", "torch", "jax", "tensorflow", "keras"),
        ("torch", "jax", "tensorflow", "onnx", "retinanet", "test"),
        pins=("onnxruntime",),
    ),
}


def name_of(requirement: str) -> str:
    """Of `torch>=2.6` the name."""
    return re.match(r"[\w-]+", requirement)[0]  # type: ignore[index]


def ranges(extras: Sequence[str]) -> dict[str, str]:
    """What pyproject.toml asks for, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(x for extra in extras for x in optional[extra])]
    return {name_of(x): x for x in wanted}


def requirements(chosen: Set) -> list[str]:
    """What pip is to install."""
    wanted = ranges(chosen.extras) | {name_of(x): x for x in chosen.pins}
    kept = [x for name, x in wanted.items() if name not in chosen.without]
    return [x.replace(">=", "==") for x in kept] if chosen.lowest else kept


def files(chosen: Set, process: str) -> Iterator[str]:
    """The test files of a process."""
    there = {*map(name_of, requirements(chosen))}
    for pattern in FILES[process]:
        for path in sorted((ROOT / "tests").glob(pattern)):
            if NEEDS.get(path.name, "numpy") in there:
                yield str(path.relative_to(ROOT))


def interpreter(version: str, pythons: Sequence[str]) -> str:
    """That of the given ones which has this version."""
    script = "import sys; print('{}.{}'.format(*sys.version_info))"
    for python in filter(shutil.which, pythons):
        done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return python
    raise SystemExit(f"no Python {version} among {', '.join(pythons)}")


def install(name: str, python: str) -> None:
    """A fresh environment."""
    chosen, place = SETS[name], BUILD / name
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([python, "-m", "venv", place], check=True)
    pip = [place / "bin" / "python", "-m", "pip"]
    # Modules are compiled as they are imported, which most of them never are.
    options = ["--quiet", "--no-compile"]
    subprocess.run([*pip, "install", *options, *requirements(chosen)], check=True)
    subprocess.run([*pip, "check"], check=True)


def versions_in(name: str) -> dict[str, str]:
    """The versions of what the set asks for, and of what computes behind it."""
    chosen = SETS[name]
    pip = [BUILD / name / "bin" / "python", "-m", "pip"]
    done = subprocess.run([*pip, "list", "--format=json"], capture_output=True, check=True)
    found = {x["name"].lower().replace("_", "-"): x["version"] for x in json.loads(done.stdout)}
    return {x: found[x] for x in (*map(name_of, requirements(chosen)), "jaxlib", "triton")}


def test(name: str, process: str) -> dict[str, Any]:
    """The tests of one framework: how many passed, and what did not."""
    place = BUILD / name
    report = place / f"{process}.xml"
    report.unlink(missing_ok=True)
    command = [place / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment |= {
        "FOCAL_BACKENDS": BACKENDS.get(process, process),
        "FOCAL_REQUIRE_ALL": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    begin = time.monotonic()
    with open(place / f"{process}.txt", "w") as log:
        code = subprocess.run(
            [*command, f"--junitxml={report}", *files(SETS[name], process)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    found = {"passed": 0, "skipped": 0, "failed": 0, "status": code}
    if report.exists():
        (suite,) = ElementTree.parse(report).getroot()
        count = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
        failed = count["failures"] + count["errors"]
        passed = count["tests"] - failed - count["skipped"]
        found |= {"passed": passed, "skipped": count["skipped"], "failed": failed}
    return found | {"seconds": round(time.monotonic() - begin)}


def run(name: str, only: Sequence[str]) -> dict[str, Any]:
    """Test the set that is installed, or only some of its processes."""
    record = {
        "date": datetime.date.today().isoformat(),
        "command": f"make test-versions SETS={name}",
        "python": python_version(BUILD / name / "bin" / "python"),
        "packages": versions_in(name),
    }
    with ThreadPoolExecutor(JOBS) as pool:
        processes = [x for x in SETS[name].processes if x in only or not only]
        found = pool.map(lambda process: test(name, process), processes)
        new = dict(zip(processes, found, strict=True))
    results = recorded().get(name, {}).get("processes", {}) | new
    return record | {"processes": {x: results[x] for x in SETS[name].processes if x in results}}


def recorded() -> dict[str, Any]:
    """What is known of all sets."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def python_version(python: Path) -> str:
    """Such as 3.11.7."""
    script = "import platform; print(platform.python_version())"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def table(record: Mapping[str, Any]) -> str:
    """What was tested with what, a column for each set."""
    names = [name for name in SETS if name in record]
    rows = [["", *(f"`{name}`: {SETS[name].about}" for name in names)]]
    rows += [[key, *(record[name][key] for name in names)] for key in ("date", "python")]
    packages = dict.fromkeys(x for name in names for x in record[name]["packages"])
    rows += [[x, *(record[name]["packages"].get(x, "") for name in names)] for x in packages]
    for process in FILES:
        found = (record[name]["processes"].get(process) for name in names)
        rows.append([f"tests of {process}", *map(outcome, found)])
    return markdown(rows)


def outcome(found: Mapping[str, Any] | None) -> str:
    """One cell."""
    if found is None:
        return ""
    failed = f", {found['failed']} failed" if found["failed"] else ""
    aborted = ", aborted" if found["status"] not in (0, 1) else ""
    return f"{found['passed']:,} passed{failed}{aborted}"


def main() -> int:
    """Run the sets, write record and page; 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sets", nargs="+", choices=SETS)
    parser.add_argument("--pythons", nargs="+", default=["python3.11", "python3.12", "python3.13"])
    parser.add_argument("--reuse", action="store_true", help="take the environments that are there")
    parser.add_argument("--only", nargs="+", choices=FILES, default=[], help="these processes")
    options = parser.parse_args()
    failed = False
    for name in options.sets:
        if not options.reuse:
            install(name, interpreter(SETS[name].python, options.pythons))
        found = run(name, options.only)
        record = recorded()
        record = {x: (record | {name: found})[x] for x in SETS if x in {*record, name}}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        PAGE.write_text(fill(PAGE.read_text(), {"versions": table(record)}))
        for process, result in found["processes"].items():
            print(f"{name}, {process}: {result}; {BUILD / name / process}.txt")
            failed |= result["status"] != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
