"""python -m tools.prepare_data flowers102 --images jpg --split split_zhou_OxfordFlowers.json

Make an ILM-VP folder (train.lmdb, test.lmdb, split.json), which the published code of this family reads too. Two ways:

  NAME --images DIR --split FILE    from an image folder and a split file of CoOp: {"train": [[path, label, class
                                    name], ...], "val": ..., "test": ...}. For the data sets of the paper these files
                                    give the published sizes; its "val" images are left out, as in the paper.
  NAME                              from torchvision's own copy of flowers102, dtd, food101, eurosat, oxfordpets,
                                    sun397 or fgvc_aircraft, downloaded where it is missing, with the split named
                                    below. But for fgvc_aircraft its sizes are NOT the published ones: results do not
                                    compare with the paper's.

The folder appears whole or not at all. Every image is decoded once before it is taken; the same command after an
interruption goes on where it was cut off. Time is that of decoding (about 200 photographs a second and core) and, for
torchvision's copies, of the download.
"""

import fcntl
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import lmdb
import numpy as np
from PIL import Image
from tqdm import tqdm

from tools.console import Parser, user_errors
from data import DATASETS, write_ilmvp
from data.decode import open_image, upright
from data.files import sync_folder
from data.ilmvp import put_all, read_split
from data.memory import num_cores
from data.registry import open_ilmvp
from data.restricted_pickle import MAX_RECORD_BYTES
from data.sources import file_stamp
from data.torchvision_sets import load_torchvision
from tools.training.run_folder import check_writable

JPEG_QUALITY = 95  # of shortened photographs
_CHUNK = 256  # images between two commits: what an interruption costs


class Copy(NamedTuple):
    """What torchvision has of a data set, and which of it becomes training and test set."""

    factory: str
    images: str  # folder of the images under the raw path; the paths of CoOp's split file start there as well
    total: int  # images that training and test set are drawn from
    train: tuple | float | int  # torchvision's splits, beside its "test"; or what to draw of each class, as is ``test``
    test: float | int | None = None


COPIES = {
    "flowers102": Copy("Flowers102", "flowers-102/jpg", 8189, ("train", "val")),
    "dtd": Copy("DTD", "dtd/dtd/images", 5640, ("train", "val")),
    "food101": Copy("Food101", "food-101/images", 101000, ("train",)),
    "eurosat": Copy("EuroSAT", "eurosat/2750", 27000, 0.5, 0.3),
    "oxfordpets": Copy("OxfordIIITPet", "oxford-iiit-pet/images", 7349, ("trainval",)),
    "sun397": Copy("SUN397", "SUN397", 108754, 40, 50),
    "fgvc_aircraft": Copy("FGVCAircraft", "fgvc-aircraft-2013b/data/images", 6667, ("train",)),
}
SPLITS = {
    "flowers102": "the official split, train and val together for training",
    "dtd": "the first official split, train and val together for training",
    "food101": "the official split",
    "eurosat": "drawn with seed 0, 50 % of each class for training and 30 % for testing; there is no official one",
    "oxfordpets": "the official split, trainval for training",
    "sun397": "drawn with seed 0, 40 images of each class for training and 50 for testing; torchvision has none",
    "fgvc_aircraft": "the official split of variants without val, which is CoOp's",
}
OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
ADDRESSES = {
    "flowers102": f"{OXFORD}/flowers/102/ (102flowers.tgz, imagelabels.mat, setid.mat)",
    "dtd": f"{OXFORD}/dtd/download/dtd-r1.0.1.tar.gz",
    "food101": "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
    "eurosat": "https://huggingface.co/datasets/torchgeo/eurosat (EuroSAT.zip)",
    "oxfordpets": f"{OXFORD}/pets/data/ (images.tar.gz and annotations.tar.gz)",
    "sun397": "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
    "fgvc_aircraft": f"{OXFORD}/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
}

# CoOp's split files: https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md
SPLIT_FILES = {
    "flowers102": "OxfordFlowers",
    "dtd": "DescribableTextures",
    "ucf101": "UCF101",
    "food101": "Food101",
    "sun397": "SUN397",
    "eurosat": "EuroSAT",
    "oxfordpets": "OxfordPets",
    "stanfordcars": "StanfordCars",
    "caltech101": "Caltech101",
    "resisc45": "Resisc45",
}

# torchvision has the folder names; these are the ones that CoOp's split file, and so the paper, shows to a CLIP
EUROSAT_NAMES = {
    "AnnualCrop": "Annual Crop Land",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}


def coop_samples(images, split_file):
    """Samples of an image folder, as a split file of CoOp names them.

    Parameters
    ----------
    images : Path
        Folder that the paths of the split file start from.
    split_file : Path

    Returns
    -------
    train, test : list of (Path, int, str)
        File, label, and path below ``images``.
    class_names : list of str
        As the split file spells them.

    Raises
    ------
    FileNotFoundError, ValueError
        A file is missing; the split file is none; a path leaves ``images``, also by way of a link.
    """
    if not images.is_dir():
        raise FileNotFoundError(f"--images {images} is not a folder")
    cleaned, counts = read_split(split_file)  # checks everything but the paths
    untrained = next((label for label in range(len(cleaned)) if not counts["train"][label]), None)
    if untrained is not None:
        raise ValueError(f'{split_file}: "train" has no image of class {cleaned[untrained]!r}; expected one or more')
    root, names, sets = images.resolve(), {}, ([], [])
    splits = json.loads(split_file.read_bytes())
    for split, samples in zip(("train", "test"), sets, strict=True):
        for name, label, class_name in splits[split]:
            path = root / name
            if not name.isprintable() or not path.resolve().is_relative_to(root):
                where = f'{split_file}, "{split}": path {name[:80]!r}'
                raise ValueError(f"{where} leads out of {root}; allowed are paths below the image folder")
            samples.append((path, label, name))
            names.setdefault(label, class_name)
    _require_files(sets, images, f"the paths of {split_file} start at --images")
    return *sets, [names[label] for label in range(len(names))]


def _require_files(sets, root, hint):
    missing = [name for samples in sets for path, _, name in samples if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} images are not in {root}: {_first(missing)}; {hint}")


def torchvision_samples(name, raw_path):
    """Samples of torchvision's own copy of a data set, downloaded where it is missing; as `coop_samples`.

    Raises
    ------
    FileNotFoundError
        It can't be downloaded, or an earlier download was cut off; the message says what to fetch, and where to.
    """
    copy = COPIES[name]
    root = raw_path / copy.images

    def load(**split):
        part = load_torchvision(copy.factory, raw_path, [root], name, ADDRESSES[name], **split)
        files = getattr(part, "_image_files", None) or getattr(part, "_images", None)
        pairs = list(zip(files, part._labels, strict=True)) if files else part.samples
        return sorted((str(path), label) for path, label in pairs), part.classes

    if copy.test is not None:
        everything, classes = load()
        total, parts = len(everything), _draw(everything, copy.train, copy.test)
    else:
        test, classes = load(split="test")
        parts = [pair for split in copy.train for pair in load(split=split)[0]], test
        total = sum(map(len, parts))
    again = f"remove {raw_path / Path(copy.images).parts[0]} and repeat the command"
    if total != copy.total:
        raise FileNotFoundError(
            f"{root} holds {total} images, expected {copy.total}: a download or an unpacking was cut off; {again}"
        )
    if name == "eurosat":
        classes = [EUROSAT_NAMES.get(each, each) for each in classes]
    if name == "sun397":  # "apartment_building/outdoor" is an outdoor apartment building
        classes = [" ".join(reversed(each.split("/"))) for each in classes]
    sets = [[(Path(p), label, Path(p).relative_to(root).as_posix()) for p, label in pairs] for pairs in parts]
    _require_files(sets, root, f"an unpacking was cut off: {again}")
    return *sets, list(classes)


def _draw(pairs, train, test):
    """Training and test samples of each class, drawn with seed 0: shares (floats) or numbers (ints) of images."""
    labels, random = np.array([label for _, label in pairs]), np.random.RandomState(0)
    chosen = [], []
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        first, second = (n if isinstance(n, int) else round(n * len(members)) for n in (train, test))
        for split, rows in zip(chosen, (members[:first], members[first : first + second]), strict=True):
            split.extend(pairs[i] for i in sorted(rows))
    return chosen


def prepare(folder, train, test, class_names, shorter_side=None):
    """Write an ILM-VP folder from image files, going on where an earlier call was cut off.

    Until it is whole, everything lies in ``.<name>.partial`` beside it: first which images were found readable (with
    their shortened form), then the LMDB files.

    Parameters
    ----------
    folder : Path
        Must not exist.
    train, test : list of (Path, int, str)
        Image file, label, and its name in ``split.json``.
    class_names : list of str
    shorter_side : int, optional
        Images with a longer shorter side are resized to it, in pixels, aspect kept; JPEG, WEBP and AVIF become JPEG of
        quality 95, the others PNG. Without it, and for smaller images, the bytes of the file are taken as they are,
        unless their EXIF orientation turns them: records are read without it.

    Raises
    ------
    ValueError
        Images that can't be read (the first ones are named), or another process is preparing this folder.
    """
    partial = folder.parent / f".{folder.name}.partial"
    with _held(partial), closing(_Checked(partial / "checked.lmdb", shorter_side)) as checked:
        bad = checked.check_all({path for path, _, _ in (*train, *test)})
        if bad:
            raise ValueError(
                f"{len(bad)} images can't be used: {_first(bad, '; ')}; nothing was written but {partial}, which "
                "remembers the good ones"
            )
        for draft in (*partial.glob(".whole.*"), *partial.glob("whole")):
            shutil.rmtree(draft)
        splits = [((checked.encoded(path), label, name) for path, label, name in samples) for samples in (train, test)]
        write_ilmvp(partial / "whole", train=splits[0], test=splits[1], class_names=class_names)
        os.replace(partial / "whole", folder)
        sync_folder(folder.parent)
    shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _held(partial):
    """Make the folder and keep other processes out of it; the lock ends with its owner."""
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is at work in {partial}; wait for it or stop it") from None
        yield


class _Checked:
    """The images found readable, in an LMDB: key of path, size, time and shorter side to shortened image or b""."""

    def __init__(self, path, shorter_side):
        self._shorter_side = shorter_side
        self._environment = lmdb.open(os.fspath(path), subdir=False, lock=False, map_size=16 << 20)

    def close(self):
        self._environment.close()

    def _key(self, path):
        return hashlib.sha256(json.dumps([*file_stamp(path), self._shorter_side]).encode()).digest()

    def _get(self, path):
        with self._environment.begin() as transaction:
            return transaction.get(self._key(path))

    def encoded(self, path):
        """The bytes to store for an image that was found readable."""
        return self._get(path) or path.read_bytes()

    def check_all(self, paths):
        """Check the images that were not checked before; the messages of those that can't be used."""
        todo, bad = sorted(path for path in paths if self._get(path) is None), []
        with (
            ThreadPoolExecutor(num_cores()) as pool,
            tqdm(
                total=len(paths), initial=len(paths) - len(todo), desc="checking images", unit="img", disable=None
            ) as bar,
        ):
            for start in range(0, len(todo), _CHUNK):
                chunk = todo[start : start + _CHUNK]
                results = list(pool.map(self._check, chunk))
                good = [(self._key(p), r) for p, r in zip(chunk, results, strict=True) if isinstance(r, bytes)]
                put_all(self._environment, good)
                bad += [str(r) for r in results if isinstance(r, ValueError)]
                bar.update(len(chunk))
        return bad

    def _check(self, path):
        """The shortened image, b"" where the file is taken as it is, or the ValueError that says why it can't be."""
        try:
            encoded = path.read_bytes()
            stored = open_image(encoded, str(path))
        except OSError as error:
            return ValueError(f"{path}: {error.strerror}")
        except ValueError as error:
            return error
        image = upright(stored)
        scale = min(1, (self._shorter_side or math.inf) / min(image.size))
        if scale == 1 and image is stored:
            if len(encoded) > MAX_RECORD_BYTES - 1024:
                return ValueError(f"{path}: {len(encoded):,} bytes are too many for a record; use --shorter-side")
            return b""
        size = [max(1, round(side * scale)) for side in image.size]
        lossy = encoded.startswith(b"\xff\xd8") or encoded[8:12] == b"WEBP" or encoded[4:8] == b"ftyp"  # AVIF
        how = {"format": "JPEG", "quality": JPEG_QUALITY, "subsampling": 0} if lossy else {"format": "PNG"}
        stream = io.BytesIO()
        image.resize(size, Image.Resampling.BICUBIC).save(stream, **how, exif=b"")
        return stream.getvalue()


def _first(items, separator=", ", limit=3):
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more


def _build_parser():
    splits = "\n".join(["splits of torchvision's copies:", *(f"  {name:14}{split}" for name, split in SPLITS.items())])
    how = {"usage": "%(prog)s NAME [options]", "description": __doc__, "epilog": splits}
    parser = Parser(prog="python -m tools.prepare_data", **how)
    add = parser.add_argument
    add("name", metavar="NAME", help="name of the data set; the folder becomes <data-path>/NAME")
    add("--images", type=Path, metavar="DIR", help="image folder that the paths of --split start from")
    add("--split", type=Path, metavar="FILE", help="split file of CoOp, split_zhou_*.json")
    add("--data-path", type=Path, default="datasets", metavar="DIR", help="folder of the data sets (default: datasets)")
    add("--raw-path", type=Path, metavar="DIR", help="where torchvision keeps its copies (default: <data-path>/raw)")
    text = "shorten larger images to N pixels on the shorter side (default: files as they are); a few times smaller, "
    add("--shorter-side", type=int, metavar="N", help=text + "but no longer the published pixels")
    return parser


def _samples(arguments):
    name, published = arguments.name, DATASETS.get(arguments.name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"NAME is {name!r}; allowed are letters, digits, '.', '_' and '-'")
    if published is not None and published.open is not open_ilmvp:
        raise ValueError(f"{name} needs no preparation: the scripts read it as it is")
    if (arguments.images is None) != (arguments.split is None):
        raise ValueError("--images and --split go together: the paths of the split file start at the image folder")
    if arguments.shorter_side is not None and arguments.shorter_side < 1:
        raise ValueError(f"--shorter-side must be 1 or more, got {arguments.shorter_side}")
    if arguments.images is not None:
        return coop_samples(arguments.images, arguments.split)
    if name not in COPIES:
        split = f"split_zhou_{SPLIT_FILES[name]}.json" if name in SPLIT_FILES else "FILE"
        raise ValueError(
            f"torchvision's copies that can be prepared are {', '.join(COPIES)}; give {name} as --images DIR --split "
            f"{split} (https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md has images and split files)"
        )
    raw = arguments.raw_path or arguments.data_path / "raw"
    print(f"split: {SPLITS[name]}", flush=True)
    if name in SPLIT_FILES:
        use = f"--images {raw / COPIES[name].images} --split split_zhou_{SPLIT_FILES[name]}.json (of CoOp)"
        print(f"which is not the paper's: for its sizes add {use}", flush=True)
    return torchvision_samples(name, raw)


@user_errors()
def main(argv=None):
    arguments = _build_parser().parse_args(argv)
    folder = arguments.data_path / arguments.name
    if folder.exists():
        if not all((folder / name).exists() for name in ("train.lmdb", "test.lmdb", "split.json")):
            raise FileExistsError(f"{folder} exists and is no ILM-VP folder; move it, or take another --data-path")
        print(f"{folder} is there already and left alone; remove it to prepare it again")
        return 0
    check_writable(folder, "--data-path")
    train, test, class_names = _samples(arguments)
    prepare(folder, train, test, class_names, arguments.shorter_side)
    print(f"{folder}: {len(train)} training and {len(test)} test images, {len(class_names)} classes")
    info = DATASETS.get(arguments.name)
    if info and (other := info.unlike(train=len(train), test=len(test), classes=len(class_names))):
        print(f"not as published: {', '.join(other)}")
    name = [arguments.name, "--data-path", str(arguments.data_path)] if info is not None else [f"folder:{folder}"]
    print("check it:", shlex.join(["python", "-m", "tools.check_data", str(folder)]))
    print("use it:", shlex.join(["--dataset", *name]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
