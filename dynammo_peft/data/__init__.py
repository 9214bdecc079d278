from .catalog import load_image_dataset
from .drift import (
    AffineMap,
    choose_ridge,
    fit_affine_map,
    fit_correction,
    fit_map_of_others,
    left_out_errors,
)
from .images import ImageBatch, LabelledImages, collate_batch, data_loader
from .memory import ExemplarMemory
from .scenario import ClassIncrementalScenario, Task
from .statistics import ClassStatistics
from .transforms import BatchTransform, decode_images, resized_image_processor


__all__ = [
    "AffineMap",
    "BatchTransform",
    "ClassIncrementalScenario",
    "ClassStatistics",
    "ExemplarMemory",
    "ImageBatch",
    "LabelledImages",
    "Task",
    "collate_batch",
    "data_loader",
    "decode_images",
    "choose_ridge",
    "fit_affine_map",
    "fit_correction",
    "fit_map_of_others",
    "left_out_errors",
    "load_image_dataset",
    "resized_image_processor",
]
