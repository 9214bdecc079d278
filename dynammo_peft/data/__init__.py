from .catalog import load_image_dataset
from .memory import ExemplarMemory
from .scenario import ClassIncrementalScenario, LabelledImages, Task
from .transforms import BatchTransform, decode_images, resized_image_processor


__all__ = [
    "BatchTransform",
    "ClassIncrementalScenario",
    "ExemplarMemory",
    "LabelledImages",
    "Task",
    "decode_images",
    "load_image_dataset",
    "resized_image_processor",
]
