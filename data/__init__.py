"""Data sets as uint8 images on the device, in batches."""

from data.class_names import clean_class_name
from data.ilmvp import write_ilmvp
from data.image_set import ImageSet, UnreadableImage
from data.loader import BatchLoader
from data.presets import clip_preset, padding_preset, watermarking_test_preset, watermarking_train_preset
from data.registry import DATASETS, DatasetInfo, Task, check_dataset_name, image_size, load_task, open_task
from data.sources import ArraySource, FileSource

__all__ = [
    "DATASETS",
    "ArraySource",
    "BatchLoader",
    "DatasetInfo",
    "FileSource",
    "ImageSet",
    "Task",
    "UnreadableImage",
    "check_dataset_name",
    "clean_class_name",
    "clip_preset",
    "image_size",
    "load_task",
    "open_task",
    "padding_preset",
    "watermarking_test_preset",
    "watermarking_train_preset",
    "write_ilmvp",
]
