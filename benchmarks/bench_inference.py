"""From images to detections on a CPU: `predict` and `evaluate` beside torchvision and onnxruntime.

    python -m benchmarks.bench_inference

The sides get the same weights and images. A wheel of torchvision that does not fit the installed
PyTorch will do, unpacked into a folder on PYTHONPATH. Without one its figures are left out.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks.common import Case, Summary, interleaved, record, table
from focal.retinanet import CONVENTIONS, PRESETS, build, load, load_torchvision, predict, save
from focal.retinanet.data import ShapesDataset, read_image
from focal.retinanet.detector import BACKENDS, _batch
from focal.retinanet.training import evaluate as evaluation
from tests.golden.make_torchvision import image, weights

SIZE, CLASSES = (512, 640), 91
MIXED = [(512, 640), (480, 640), (512, 480), (384, 640)]
FILES, EVALUATED = 8, 64


def main() -> None:
    """Measure, write, print."""
    with tempfile.TemporaryDirectory() as folder:
        found = {"r50": r50(Path(folder)), **tiny(Path(folder))}
    report = record("inference_cpu", "python -m benchmarks.bench_inference", **found)
    for rows in (speed_rows(report), parts_rows(report), frameworks_rows(report)):
        print(table(rows), end="\n\n")
    for name in ("r50", "tiny"):
        print(name, report[name]["apart"], report[name]["start_s"])


# ---------------------------------------------------------------- beside others


def r50(folder: Path) -> dict[str, Any]:
    """The network of the paper as in torchvision, seeded weights, images of squares."""
    import torch

    given, network = _torchvision()
    model, compiled = (
        load_torchvision(given, image_size=SIZE, norm_eps=1e-5, device="cpu") for _ in range(2)
    )
    compiled.compile(options={"freezing": True})
    images, mixed = [image(SIZE)], [image(size) for size in MIXED]
    reduced = _in_bfloat16(model)

    def other(some: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        with torch.inference_mode():
            tensors = [torch.from_numpy(x).permute(2, 0, 1).float() / 255 for x in some]
            found = network(tensors)
        return [{name: x.numpy() for name, x in one.items()} for one in found]

    start, compile_s = time.perf_counter(), 0.0
    predict(compiled, images)
    compile_s = round(time.perf_counter() - start, 1)
    run, export_s = _onnx(model, folder / "r50.onnx")
    ways: dict[str, Callable[[Any], Any]] = {"focal": lambda some: predict(model, some)}
    if network is not None:
        ways["torchvision"] = other
    ways |= {
        "onnxruntime": lambda some: [run(x) for x in some],
        "focal, compiled": lambda some: predict(compiled, some),
        **reduced,
    }
    exact = {name: way for name, way in ways.items() if name not in reduced}
    several = {name: way for name, way in ways.items() if name != "focal, compiled"}
    return {
        "cases": {
            "one image, 512 x 640": _case(ways, images, 9),
            "4 images of mixed sizes": _case(several, mixed, 3),
        },
        "apart": _apart(exact, images),
        "start_s": {"focal, compiled": compile_s, "onnxruntime, export and load": export_s},
        "parts": _parts(model, images, 5),
    }


def tiny(folder: Path) -> dict[str, Any]:
    """The preset on its canvas, from files; then in every framework."""
    data = ShapesDataset("test", size=(480, 640), num_images=FILES)
    files = [folder / f"{index}.jpg" for index in range(FILES)]
    for index, path in enumerate(files):
        Image.fromarray(data[index].image).save(path, quality=90)
    model = build(PRESETS["tiny"].detector.replace(classes=data.classes), device="cpu")
    _seed(model)
    # So that a few per cent of all scores are above the threshold.
    model.head["classification_head"].cls_logits.bias.data.fill_(-3.5)
    save(model, folder / "tiny.safetensors")
    run, export_s = _onnx(model, folder / "tiny.onnx")
    ways: dict[str, Callable[[Any], Any]] = {
        "focal": lambda some: predict(model, some),
        "onnxruntime": lambda some: [run(read_image(path)) for path in some],
        **_in_bfloat16(model),
    }
    frameworks = {name: _in_a_process(name, folder) for name in BACKENDS}
    return {
        "tiny": {
            "cases": {
                "one file, 480 x 640": _case(ways, files[:1], 41),
                f"{FILES} files": _case(ways, files, 21),
            },
            "apart": _apart({name: ways[name] for name in ("focal", "onnxruntime")}, files),
            "start_s": {"onnxruntime, export and load": export_s},
            "parts": _parts(model, files, 21),
        },
        "frameworks": frameworks,
    }


def _torchvision() -> tuple[dict[str, Any], Any]:
    """A state dict of torchvision, and its network, or None where it cannot be imported."""
    import torch

    from benchmarks.torchvision_python import torchvision

    try:
        package = torchvision()
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        print(f"torchvision is left out: {error}", file=sys.stderr)
        config = PRESETS["r50"].detector.replace(classes=tuple(map(str, range(CLASSES))))
        model = build(config.replace(**CONVENTIONS["torchvision"]), device="cpu")
        return _seed(model), None
    network = package.models.detection.retinanet_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES,
        min_size=min(SIZE),
        max_size=max(SIZE),
    )
    _seed(network)
    for module in network.modules():
        assert not isinstance(module, torch.nn.BatchNorm2d) or module.eps == 1e-5
    return network.state_dict(), network.eval()


def _seed(network: Any) -> dict[str, Any]:
    """Weights with which activations neither vanish nor grow; the state dict."""
    import torch

    shapes = {k: tuple(x.shape) for k, x in network.state_dict().items() if x.is_floating_point()}
    tensors = {name: torch.from_numpy(x) for name, x in weights(shapes).items()}
    network.load_state_dict(tensors, strict=False)  # but for the counters of batches
    return network.state_dict()


def _in_bfloat16(model: Any) -> dict[str, Callable[[Any], Any]]:
    """`predict` under PyTorch's autocast, where the processor is faster with bfloat16."""
    import torch

    from focal.retinanet.torch.trainer import _fast_precision

    def reduced(some: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return predict(model, some)

    native = _fast_precision(torch.device("cpu")) == "bfloat16"
    return {"focal, bfloat16": reduced} if native else {}


def _onnx(model: Any, path: Path) -> tuple[Callable[[np.ndarray], Any], float]:
    """What runs our export on an image of any size, and the seconds to have it."""
    import onnxruntime
    import torch

    from focal.retinanet import export

    start = time.perf_counter()
    export(model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options)
    seconds = round(time.perf_counter() - start, 1)

    def run(image: np.ndarray) -> dict[str, np.ndarray]:
        boxes, scores, labels = session.run(None, {"image": image})
        return {"boxes": boxes, "scores": scores, "labels": labels}

    return run, seconds


def _case(
    ways: Mapping[str, Callable[[Any], Any]], given: Sequence[Any], repetitions: int
) -> dict[str, Any]:
    """Times of all sides, and the images that they take at once."""
    sides: dict[str, Case] = {name: lambda w=way: w(given) for name, way in ways.items()}
    return {"images": len(given), **interleaved(sides, repetitions, warm_up=2)}


def _apart(ways: Mapping[str, Callable[[Any], Any]], given: Sequence[Any]) -> dict[str, float]:
    """The largest difference between our sorted scores and those of each side."""
    own, *others = ([np.sort(one["scores"]) for one in way(given)] for way in ways.values())
    names = list(ways)[1:]
    apart = {}
    for name, other in zip(names, others, strict=True):
        assert [len(x) for x in own] == [len(x) for x in other] and len(own[0]), name
        apart[name] = max(float(np.abs(a - b).max()) for a, b in zip(own, other, strict=True))
    return apart


# ---------------------------------------------------------------- what takes the time


def _parts(model: Any, given: Sequence[Any], repetitions: int) -> dict[str, Any]:
    """The parts of `predict`, one after the other, and how many images they are for."""
    import torch

    import focal.torch as F
    from focal.retinanet import postprocess
    from focal.retinanet.torch.trainer import _normalized

    config = model.config
    images = [read_image(x) if isinstance(x, Path) else x for x in given]
    batch = _batch("predict", config, images)
    with torch.inference_mode():
        x = _normalized(model, batch.images)
        logits, deltas = model(x)
        sizes = torch.as_tensor(batch.sizes)
        outputs = F, logits, deltas, model.anchors(config.image_size), sizes, config
        with mock.patch.object(postprocess, "best", side_effect=postprocess.best) as best:
            postprocess.detections(*outputs)
        candidates = best.call_args.args
        sides: dict[str, Case] = {
            "read": lambda: [read_image(x) for x in given if isinstance(x, Path)],
            "scale": lambda: _batch("predict", config, images),
            "normalize": lambda: _normalized(model, batch.images),
            "network": lambda: model(x),
            "detections": lambda: postprocess.detections(*outputs),
            "suppression": lambda: postprocess.best(*candidates),
        }
        times = interleaved(sides, repetitions, warm_up=2)
    return {"images": len(given), **times}


def _in_a_process(backend: str, folder: Path) -> dict[str, Any]:
    """`framework` in a process of its own, so that threads do not meet."""
    program = (
        "import json, sys; from benchmarks.bench_inference import framework; "
        "print(json.dumps(framework(*sys.argv[1:])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, backend, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def framework(backend: str, folder: str) -> dict[str, Any]:
    """Images per second of `predict`, `evaluate`, and the parts of the latter, in milliseconds."""
    model = load(Path(folder, "tiny.safetensors"), backend, "cpu")
    files = sorted(Path(folder).glob("*.jpg"))
    data = ShapesDataset("test", size=(240, 320), num_images=EVALUATED)
    spent: dict[str, list[float]] = {"detect": [], "coco_metrics": [], "all": []}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            spent[name][-1] += time.perf_counter() - start
            return result

        return run

    evaluate = timed("all", evaluation.evaluate_model)
    start = time.perf_counter()
    predict(model, files)
    first = time.perf_counter() - start
    with (
        mock.patch.object(evaluation, "detect", timed("detect", evaluation.detect)),
        mock.patch.object(
            evaluation, "coco_metrics", timed("coco_metrics", evaluation.coco_metrics)
        ),
    ):
        for _ in range(6):
            for values in spent.values():
                values.append(0.0)
            _, found = evaluate(model, data)
    whole = {name: statistics.median(values[1:]) for name, values in spent.items()}
    prediction: Summary = interleaved({"predict": lambda: predict(model, files)}, 21)["predict"]
    return {
        "predict_first_s": round(first, 2),
        "predict_images_per_s": round(FILES / prediction["median_ms"] * 1e3, 1),
        "evaluate_images_per_s": round(EVALUATED / whole["all"], 1),
        "detections_per_image": round(statistics.mean(len(x["scores"]) for x in found), 1),
        "evaluate_ms": {name: round(seconds * 1e3, 1) for name, seconds in whole.items()},
    }


# ---------------------------------------------------------------- tables


def speed_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Images per second of all sides; ours divided by torchvision's where it was there."""
    names = ("focal", "torchvision", "onnxruntime", "focal, compiled", "focal, bfloat16")
    rows: list[tuple[str, ...]] = [("images at once", *names, "focal to torchvision")]
    for network in ("r50", "tiny"):
        for name, case in report[network]["cases"].items():
            times = [case.get(side, {}).get("median_ms") for side in names]
            speeds = [f"{case['images'] / t * 1e3:.2f}" if t else "" for t in times]
            ratio = f"{times[1] / times[0]:.2f}" if times[1] else ""
            rows.append((f"{network}, {name}", *speeds, ratio))
    return rows


def parts_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Milliseconds an image of each part of `predict`."""
    names = ("read", "scale", "normalize", "network", "detections", "suppression")
    rows: list[tuple[str, ...]] = [("ms an image", *names[:5], "of which suppression")]
    for network in ("r50", "tiny"):
        parts = report[network]["parts"]
        each = [f"{parts[name]['median_ms'] / parts['images']:.2f}" for name in names]
        rows.append((f"{network}, {parts['images']} at once", *each))
    return rows


def frameworks_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """`predict` and `evaluate` of `tiny` in each framework."""
    rows: list[tuple[str, ...]] = [
        ("tiny", "predict, images/s", "first 8, s", "evaluate, images/s", "pycocotools' share")
    ]
    for name, found in report["frameworks"].items():
        ms = found["evaluate_ms"]
        cells = (
            f"{found['predict_images_per_s']:.0f}",
            f"{found['predict_first_s']:.1f}",
            f"{found['evaluate_images_per_s']:.0f}",
            f"{ms['coco_metrics'] / ms['all']:.0%}",
        )
        rows.append((name, *cells))
    return rows


if __name__ == "__main__":
    main()
