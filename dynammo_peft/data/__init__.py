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
    "resized_image_processor",
]
