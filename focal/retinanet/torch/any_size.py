"""The ONNX operators around a detector that scale an image to the canvas, and its boxes back.

They do what `data.transforms.fit` and `place` do, and `detector.detect`. Sizes and scale are
computed in float64, as there.
"""

from __future__ import annotations

from string import Template
from typing import TYPE_CHECKING

from focal.retinanet.config import RetinaNetConfig

if TYPE_CHECKING:
    import onnx

__all__ = ["OUTPUTS", "after_graph", "before_graph", "wrapped"]

OUTPUTS = ("canvas_boxes", "all_scores", "all_labels", "count")
"""What the detector of canvases must call its outputs: the image's are `boxes` and so on."""

BEFORE = Template("""
<ir_version: $ir, opset_import: ["" : 18]>
before (uint8[height, width, 3] image)
    => (uint8[1, $height, $width, 3] images, int64[1, 2] sizes,
        int64[2] image_sides, double image_scale)
    <double[2] room = {$height, $width}, int64[2] canvas = {$height, $width},
     int64[1] canvas_width = {$width}, int64[4] batch_shape = {1, $height, $width, 3},
     uint8[3] fill = {$fill}, double epsilon = {1e-6}, double one = {1}, double more = {1.0000005},
     int64[1] zero = {0}, int64[1] three = {3}, int64[2] origin = {0, 0}, int64[2] axes = {0, 1}>
{
    image_sides = Shape <end: int = 2> (image)
    wide_sides = Cast <to: int = 11> (image_sides)
    ratios = Div (room, wide_sides)
    image_scale = ReduceMin <keepdims: int = 0> (ratios)

    exact = Mul (wide_sides, image_scale)
    exact_up = Add (exact, epsilon)
    floored = Floor (exact_up)
    wide_size = Max (floored, one)
    size = Cast <to: int = 7> (wide_size)
    sizes = Unsqueeze (size, zero)

    covered = Div (wide_size, image_scale)
    whole = Ceil (covered)
    within = Min (whole, wide_sides)
    end = Cast <to: int = 7> (within)
    part = Slice (image, origin, end, axes)

    pixel = Div (one, wide_sides)
    wide_factors = Max (pixel, image_scale)
    factors = Cast <to: int = 1> (wide_factors)
    wide_larger = Mul (wide_factors, more)
    larger = Cast <to: int = 1> (wide_larger)
    part_sides = Cast <to: int = 1> (end)
    reached = Mul (part_sides, factors)
    wanted = Cast <to: int = 1> (size)
    short = Less (reached, wanted)
    used = Where (short, larger, factors)
    resized = Resize <mode = "linear", antialias: int = 1, exclude_outside: int = 1,
        coordinate_transformation_mode = "half_pixel", axes: ints = [0, 1]> (part, , used)
    fitted = Slice (resized, origin, size, axes)

    rows, columns = Split <num_outputs: int = 2> (size)
    free = Sub (canvas, size)
    rows_below, columns_right = Split <num_outputs: int = 2> (free)
    right_shape = Concat <axis: int = 0> (rows, columns_right, three)
    right = Expand (fill, right_shape)
    upper = Concat <axis: int = 1> (fitted, right)
    lower_shape = Concat <axis: int = 0> (rows_below, canvas_width, three)
    lower = Expand (fill, lower_shape)
    placed = Concat <axis: int = 0> (upper, lower)
    images = Reshape (placed, batch_shape)
}
""")
"""`larger`: float32 may round the scale down, and the last row or column would be lost."""

AFTER = Template("""
<ir_version: $ir, opset_import: ["" : 18]>
after (float[1, $most, 4] canvas_boxes, float[1, $most] all_scores, int64[1, $most] all_labels,
       int64[1] count, int64[2] image_sides, double image_scale)
    => (float[n, 4] boxes, float[n] scores, int64[n] labels)
    <int64[1] zero = {0}, int64[4] order = {1, 0, 1, 0}>
{
    first_boxes = Squeeze (canvas_boxes, zero)
    real_boxes = Slice (first_boxes, zero, count, zero)
    wide_boxes = Cast <to: int = 11> (real_boxes)
    wide_scaled = Div (wide_boxes, image_scale)
    scaled = Cast <to: int = 1> (wide_scaled)
    corner = Gather (image_sides, order)
    limit = Cast <to: int = 1> (corner)
    boxes = Min (scaled, limit)
    first_scores = Squeeze (all_scores, zero)
    scores = Slice (first_scores, zero, count, zero)
    first_labels = Squeeze (all_labels, zero)
    labels = Slice (first_labels, zero, count, zero)
}
""")


def wrapped(detector: onnx.ModelProto, config: RetinaNetConfig) -> onnx.ModelProto:
    """The detector of canvases, with the outputs `OUTPUTS`, as one of images of any size."""
    from onnx.compose import merge_models

    version = detector.ir_version
    ins, outs = ("images", "sizes"), (*OUTPUTS, "image_sides", "image_scale")
    model = merge_models(before_graph(config, version), detector, io_map=[(x, x) for x in ins])
    return merge_models(model, after_graph(config, version), io_map=[(x, x) for x in outs])


def before_graph(config: RetinaNetConfig, ir_version: int) -> onnx.ModelProto:
    """From an image to what the detector of canvases takes."""
    height, width = config.image_size
    fill = ", ".join(map(str, config.fill))
    text = BEFORE.substitute(height=height, width=width, fill=fill, ir=ir_version)
    return _parsed(text, "before/")


def after_graph(config: RetinaNetConfig, ir_version: int) -> onnx.ModelProto:
    """From what the detector of canvases gives to detections in the image."""
    return _parsed(AFTER.substitute(most=config.max_detections, ir=ir_version), "after/")


def _parsed(text: str, prefix: str) -> onnx.ModelProto:
    """The model; what is between input and output gets a name that the detector does not have."""
    from onnx.compose import add_prefix
    from onnx.parser import parse_model

    return add_prefix(parse_model(text), prefix, rename_inputs=False, rename_outputs=False)
