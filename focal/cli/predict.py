"""`focal predict`."""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from focal.cli.options import Commands, add_backend, add_inference, inference

__all__ = ["add", "run"]

BATCH = 8
SUFFIXES = "jpg jpeg jpe png tif tiff webp bmp gif jp2 j2k ppm pgm pbm".split()
"""The files of a folder that are taken for images; others are read where they are named."""

EPILOG = """\
For each image NAME there are NAME.png, with the boxes drawn, and NAME.json with
  image, image_size   the path, and width and height in pixels
  found               best first, for each object: class, label (its index), category_id (as in the
                      COCO files of the training data), score, box (x1, y1, x2, y2 in pixels)

A file that cannot be read is reported, and the others go on.

exit status: 0 if all images were read; 1 if some were not; 2 if none was, or the command is wrong
"""


def add(commands: Commands) -> None:
    """Add the command and its options."""
    predict = commands.add_parser(
        "predict",
        help="find objects in images",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    predict.add_argument("weights", type=Path, help="a weights file, a checkpoint or a run folder")
    predict.add_argument(
        "images", nargs="+", help="image files, folders of them, or patterns such as 'a/*.jpg'"
    )
    add_backend(predict)
    add_inference(predict)
    predict.add_argument("--out", type=Path, default=Path("predictions"), help="folder to write")
    predict.add_argument("--json-only", action="store_true", help="draw no pictures")
    predict.add_argument(
        "--results",
        type=Path,
        help="also write all detections to this results file of COCO; "
        "image_id counts the images from 1 on, in the order given",
    )
    predict.add_argument(
        "--score",
        type=float,
        default=0.3,
        help="lowest score that is drawn (default 0.3); the JSON files have all",
    )
    predict.set_defaults(run=run)


def run(options: argparse.Namespace, _: str) -> int:
    """Run the command."""
    from focal.files import write_atomically
    from focal.retinanet.data.dataset import category_ids
    from focal.retinanet.data.loader import prefetch
    from focal.retinanet.detector import load, predict
    from focal.retinanet.training.evaluate import coco_results
    from focal.retinanet.training.progress import ProgressBar

    paths = _files(options.images)
    model = load(options.weights, options.backend, options.device, **inference(options))
    classes, ids = model.config.classes, category_ids(model.config)
    _check_overwrites(options, paths)
    for folder in (options.out, options.results and options.results.parent):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    bar = ProgressBar(total=len(paths), unit="image", disable=None)  # on a terminal alone
    results: list[str] = []  # as text, which is smaller
    failed = 0
    with bar, ThreadPoolExecutor(BATCH) as pool:
        starts = range(0, len(paths), BATCH)
        # One batch is decoded ahead.
        batches = prefetch(lambda i: [*pool.map(_read, paths[i : i + BATCH])], starts, 1, ahead=1)
        for first, batch in zip(starts, batches, strict=True):
            images = {i: x for i, x in enumerate(batch, first) if isinstance(x, np.ndarray)}
            found = dict(zip(images, predict(model, [*images.values()]), strict=True))
            written = {
                i: pool.submit(_write, paths[i], image, found[i], classes, ids, options)
                for i, image in images.items()
            }
            for i, image in enumerate(batch, first):
                if i not in written:
                    bar.write(f"focal: {image}", file=sys.stderr)
                    failed += 1
                    continue
                bar.write(f"{paths[i]}: {written[i].result()}")
                if options.results:
                    own = coco_results(i + 1, found[i], ids)
                    name = {"file_name": paths[i].name}
                    results += [json.dumps(name | entry) for entry in own]
            bar.update(len(batch))
    if options.results:
        write_atomically(options.results, ("[" + ",\n".join(results) + "]").encode())
    return 2 if failed == len(paths) else min(failed, 1)


def _files(arguments: list[str]) -> list[Path]:
    """The files that the arguments name, each once."""
    files: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower()[1:] in SUFFIXES)
            if not inside:
                raise ValueError(f"{path}: a folder without image files")
            files += inside
        else:
            matches = [] if path.exists() else sorted(glob.glob(argument))
            files += map(Path, matches or [argument])  # what is not there is reported later
    return list(dict.fromkeys(files))


def _check_overwrites(options: argparse.Namespace, paths: list[Path]) -> None:
    """No picture may replace an image, or the picture of another."""
    seen = set()
    for path in paths:
        picture = options.out / f"{path.stem}.png"
        onto_itself = path.is_file() and picture.resolve() == path.resolve()
        if picture in seen or (onto_itself and not options.json_only):
            raise ValueError(f"--out {options.out}: {picture.name} would overwrite another image")
        seen.add(picture)


def _read(path: Path) -> np.ndarray | ValueError:
    from focal.retinanet.data import DataError, read_image

    try:
        return read_image(path)
    except DataError as error:
        return error


def _write(
    path: Path,
    image: np.ndarray,
    found: Mapping[str, np.ndarray],
    classes: tuple[str, ...],
    ids: tuple[int, ...],
    options: argparse.Namespace,
) -> str:
    """Write the files of one image; what there is to say about it."""
    from focal.files import write_atomically

    boxes, labels, scores = found["boxes"], found["labels"], found["scores"]
    shown = scores >= options.score
    record = {
        "image": str(path),
        "image_size": {"width": image.shape[1], "height": image.shape[0]},
        "box_format": "x1, y1, x2, y2 in pixels",
        "found": [
            {
                "class": classes[label],
                "label": int(label),
                "category_id": ids[label],
                "score": round(float(score), 5),
                "box": [round(float(v), 2) for v in box],
            }
            for box, label, score in zip(boxes, labels, scores, strict=True)
        ],
    }
    target = options.out / f"{path.stem}.json"
    write_atomically(target, json.dumps(record, indent=1).encode())
    if options.json_only:
        return f"{int(shown.sum())} objects -> {target}"
    from focal.retinanet.report.draw import draw_boxes, save_image

    drawn = draw_boxes(image, boxes[shown], labels[shown], classes, scores[shown])
    picture = save_image(target.with_suffix(".png"), drawn, optimize=False)
    return f"{int(shown.sum())} objects -> {picture}, {target.name}"
