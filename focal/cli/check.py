"""`focal check`."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import focal
from focal.cli.options import Commands, add_detector, assignments

if TYPE_CHECKING:
    from focal.retinanet.presets import Preset

__all__ = ["add", "run"]

EPILOG = """\
All splits are read, each image is decoded once, and every problem is listed with file and record.
Errors would stop training or evaluation: files that are missing, broken, outside the folder or not
of the size in the JSON; records with a missing, wrong, unknown or duplicate value; a missing train
split; classes that differ between splits. Where there is no val split, the images that training
would hold out of train are checked as val. Everything else is a warning: boxes that are
dropped or clipped, duplicate images, boxes and files, images in two splits, images without a class,
boxes of an unusual size, and more.

Box sizes and anchor coverage are those of --preset, --convention and --image-size, on whole images
without augmentation. If there are no errors, the last lines are the command to train with, and
what it chooses to fit the training boxes (preset tiny), with the share that an anchor reaches.

exit status: 0 if there are no errors, whatever the warnings; 1 if there are errors;
             2 if there is nothing to check, or the command is wrong
"""


def add(commands: Commands) -> None:
    """Add the command and its options."""
    check = commands.add_parser(
        "check",
        help="find errors in a dataset",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("data", type=Path, help="a COCO folder or JSON file, as train reads it")
    add_detector(check)
    check.add_argument("--out", type=Path, help="also write check.json and check.png here")
    check.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> int:
    """Run the command."""
    from focal.files import write_atomically
    from focal.retinanet.report.check import check_data, read_boxes
    from focal.retinanet.report.check_picture import check_picture
    from focal.retinanet.report.check_report import check_record, check_text
    from focal.retinanet.settings import apply, preset_settings

    start = preset_settings(options.preset or "tiny", options.convention or "paper")
    settings = apply(start, assignments(options))
    findings, splits = check_data(options.data, progress=True)
    boxes = read_boxes(splits, settings.detector)
    notes = {"command": command, "data": str(options.data), "focal": focal.__version__}
    if not any(finding.level == "error" for finding in findings):
        notes["suggested"] = _suggested(options, settings)
    record = check_record(findings, splits, boxes, settings.detector, notes)
    print(check_text(record))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, indent=1, allow_nan=False)
        write_atomically(options.out / "check.json", text.encode())
        picture = check_picture(boxes, record, settings.detector, options.out / "check.png")
        print(f"\nwritten: {options.out / 'check.json'}, {picture.name}")
    return 1 if record["errors"] else 0


def _suggested(options: argparse.Namespace, settings: Preset) -> str:
    """The command to train with and, where it fits the detector to the boxes, what it chooses."""
    from focal.retinanet.data import CocoDataset
    from focal.retinanet.data.fitting import fit_config

    words = ["focal", "train", "--data", str(options.data)]
    for name in ("preset", "convention", "image_size"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", value]
    text = shlex.join(words)
    if options.preset in (None, "tiny"):
        data, fixed = CocoDataset(options.data, "train"), assignments(options)
        text += f"\n{fit_config(data, *settings, fixed).sentence}"
    return text
