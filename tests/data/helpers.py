"""Small images and ILM-VP folders for the tests of `data`."""

import io
import json
import os
import pickle
from pathlib import Path

import lmdb
import numpy as np
from PIL import Image

from data import write_ilmvp
from data.ilmvp import LmdbSource, read_split


def encoded_image(seed, size=(40, 30), format="PNG"):
    """Encoded image of random pixels, `size` as (width, height)."""
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def make_ilmvp(folder, train_labels=(0, 0, 1, 2, 1), test_labels=(0, 1, 2)):
    """Write an ILM-VP folder of random images with three classes; return `folder`."""
    names = ["Hard-leaved_orchid", "rose", "tulip"]
    train = [(encoded_image(i), label, f"{i}.png") for i, label in enumerate(train_labels)]
    test = [(encoded_image(100 + i), label, f"{i}.png") for i, label in enumerate(test_labels)]
    write_ilmvp(folder, train=train, test=test, class_names=names)
    return folder


def put(path, key, value):
    """Put the pickled `value` under `key` into an LMDB file."""
    with lmdb.open(str(path), subdir=False, lock=False, map_size=64 << 20) as environment:
        with environment.begin(write=True) as transaction:
            transaction.put(key, pickle.dumps(value))


def edit_split(folder, edit):
    """Apply `edit` to the parsed ``split.json`` of `folder` in place."""
    path = folder / "split.json"
    splits = json.loads(path.read_text())
    edit(splits)
    path.write_text(json.dumps(splits))


def make_class_folders(root, train=None, test=None):
    """Write ``root/{train,test}/<class>/<i>.png``; arguments map class folders to counts."""
    for split, classes in (("train", train or {"cat": 2, "dog": 3}), ("test", test or {"cat": 1, "dog": 1})):
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i}.png").write_bytes(encoded_image(hash((split, name)) % 999 + i))
    return root


def write_flowers_subset(folder, labels):
    """Write some labels of the real flowers (``BLM_REAL_DATA``) as labels 0, 1, ...; return their class names."""
    source = Path(os.environ["BLM_REAL_DATA"]) / "flowers102"
    names, _ = read_split(source / "split.json")
    splits = {}
    for split in ("train", "test"):
        lmdb_source = LmdbSource(source / f"{split}.lmdb")
        records = (lmdb_source.record(i) for i in range(len(lmdb_source)))
        kept = [(encoded, labels.index(label)) for encoded, label in records if label in labels]
        splits[split] = [(encoded, label, f"{i}.jpg") for i, (encoded, label) in enumerate(kept)]
    names = [names[label] for label in labels]
    write_ilmvp(folder, **splits, class_names=names)
    return names
