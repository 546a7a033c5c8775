"""Datasets, augmentation and batches: NumPy and Pillow, the same for every framework."""

from focal.retinanet.data.coco import CocoDataset
from focal.retinanet.data.dataset import Dataset, Example, Transformed
from focal.retinanet.data.images import DataError, read_image, resize
from focal.retinanet.data.loader import Batch, eval_batches, train_batches
from focal.retinanet.data.shapes import ShapesDataset

__all__ = [
    "Batch",
    "CocoDataset",
    "DataError",
    "Dataset",
    "Example",
    "ShapesDataset",
    "Transformed",
    "eval_batches",
    "read_image",
    "resize",
    "train_batches",
]
