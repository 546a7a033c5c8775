"""The results of a part, written after every measurement, and the clock that it watches."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focal.files import write_atomically

NOT_REACHED = "not reached"
TRACEBACK_LINES = 12

Plan = Mapping[str, Callable[[], Any]]


class LeftOut(Exception):
    """A measurement cannot be made here; the message says why."""


class Again(Exception):
    """A measurement is to be made again in a new process, without what has failed in this one."""


class Report:
    """The results of a part: a JSON file that is complete after every change."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    @classmethod
    def start(cls, path: Path, **head: Any) -> Report:
        """A new report, which replaces an old one."""
        empty: dict[str, Any] = {"measured": {}, "failed": {}, "left_out": {}, "running": None}
        report = cls(path, {**head, "state": "running", **empty})
        report.write()
        return report

    @classmethod
    def read(cls, path: Path) -> Report:
        """A report that another process has written to."""
        return cls(path, json.loads(path.read_text(encoding="utf-8")))

    def write(self, **changes: Any) -> None:
        """Change entries and write the file."""
        self.content |= changes
        text = json.dumps(strict(self.content), indent=1, default=str, allow_nan=False) + "\n"
        write_atomically(self.path, text.encode())

    def expect(self, names: Mapping[str, Any]) -> list[str]:
        """The planned measurements that are to be made; until then they are not reached."""
        done = {**self.content["measured"], **self.content["failed"]}
        left_out = self.content["left_out"]
        todo = [n for n in names if n not in done and left_out.get(n, NOT_REACHED) == NOT_REACHED]
        left_out |= dict.fromkeys(todo, NOT_REACHED)
        self.write()
        return todo

    def attempt(self, name: str, measure: Callable[[], Any]) -> Any:
        """What a measurement returns, None if it fails. Either is recorded."""
        self.write(running=name)
        begin = time.monotonic()
        try:
            result = measure()
        except LeftOut as reason:
            self.content["left_out"][name] = str(reason)
            result = None
        except Again:
            result = None
        except Exception as error:
            self.fail(name, f"{type(error).__name__}: {error}", traceback.format_exc())
            result = None
        else:
            self.content["measured"][name] = result
            self.content["left_out"].pop(name, None)
        seconds = time.monotonic() - begin
        self.write(running=None)
        print(f"  {self.outcome(name)}: {name} ({seconds:.1f} s)", flush=True)
        return result

    def fail(self, name: str, message: str, trace: str = "") -> None:
        """Record a failure; the end of its traceback is kept."""
        self.content["left_out"].pop(name, None)
        self.content["failed"][name] = {
            "error": message[:2000],
            "traceback": trace.splitlines()[-TRACEBACK_LINES:],
        }
        self.write()

    def outcome(self, name: str) -> str:
        """What became of a measurement."""
        if name in self.content["failed"]:
            return f"FAILED, {self.content['failed'][name]['error'][:300]}"
        if name in self.content["left_out"]:
            return f"left out, {self.content['left_out'][name]}"
        return "done"


def strict(value: Any) -> Any:
    """With text for numbers that are not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Job:
    """What a stage is to do, and with what."""

    stage: str
    """Name of the module."""
    report: Report
    end: float
    """`time.time()` when the part is to be over."""
    out: Path
    scratch: Path
    """A folder for what is not a result."""
    data: Path | None = None
    """A folder in the COCO format."""
    dry: bool = False
    """On a CPU, in small sizes."""

    @property
    def device(self) -> str:
        """PyTorch's name of the device."""
        return "cpu" if self.dry else "cuda"

    def seconds_left(self) -> float:
        """Until the part is to be over."""
        return self.end - time.time()

    def to_json(self) -> str:
        """For another process."""
        fields = {**vars(self), "report": self.report.path}
        return json.dumps(fields, default=lambda path: str(path.resolve()))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What `to_json` wrote."""
        fields = json.loads(text)
        paths = {
            k: None if fields[k] is None else Path(fields[k]) for k in ("out", "scratch", "data")
        }
        return cls(**{**fields, **paths, "report": Report.read(Path(fields["report"]))})
