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
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import lmdb
import numpy as np
from PIL import Image
from tqdm import tqdm

from tools.console import Parser, user_errors
from data import DATASETS, write_ilmvp
from data.decode import open_image, upright
from data.files import sync_folder
from data.ilmvp import read_split
from data.registry import open_ilmvp
from data.restricted_pickle import MAX_RECORD_BYTES
from models.torchvision_shim import ensure_torchvision

JPEG_QUALITY = 95  # of shortened photographs
_CHUNK = 256  # images between two commits: what an interruption costs


@dataclass(frozen=True)
class Copy:
    """What torchvision has of a data set, and which of it becomes training and test set."""

    factory: str
    images: str  # folder of the images under the raw path; the paths of CoOp's split file start there as well
    address: str
    total: int  # images that training and test set are drawn from
    split: str


COPIES = {
    "flowers102": Copy(
        "Flowers102",
        "flowers-102/jpg",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ (102flowers.tgz, imagelabels.mat, setid.mat)",
        8189,
        "the official split, train and val together for training",
    ),
    "dtd": Copy(
        "DTD",
        "dtd/dtd/images",
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
        5640,
        "the first official split, train and val together for training",
    ),
    "food101": Copy(
        "Food101",
        "food-101/images",
        "http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
        101000,
        "the official split",
    ),
    "eurosat": Copy(
        "EuroSAT",
        "eurosat/2750",
        "https://huggingface.co/datasets/torchgeo/eurosat (EuroSAT.zip)",
        27000,
        "drawn with seed 0, 50 % of each class for training and 30 % for testing; there is no official one",
    ),
    "oxfordpets": Copy(
        "OxfordIIITPet",
        "oxford-iiit-pet/images",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/data/ (images.tar.gz and annotations.tar.gz)",
        7349,
        "the official split, trainval for training",
    ),
    "sun397": Copy(
        "SUN397",
        "SUN397",
        "http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz",
        108754,
        "drawn with seed 0, 40 images of each class for training and 50 for testing; torchvision has none",
    ),
    "fgvc_aircraft": Copy(
        "FGVCAircraft",
        "fgvc-aircraft-2013b/data/images",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
        6667,
        "the official split of variants without val, which is CoOp's",
    ),
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
    root, names, found, missing = images.resolve(), {}, {}, []
    splits = json.loads(split_file.read_bytes())
    for split in ("train", "test"):
        found[split] = []
        for name, label, class_name in splits[split]:
            names.setdefault(label, class_name)
            path = _inside(root, name, f'{split_file}, "{split}"')
            found[split].append((path, label, name))
            if not path.is_file():
                missing.append(name)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} images of {split_file} are not in {images}: {_first(missing)}; its paths start at --images"
        )
    return found["train"], found["test"], [names[label] for label in range(len(names))]


def _inside(root, name, where):
    """The file ``name`` below ``root`` (resolved), refused wherever it would lead out of it."""
    parts = PurePosixPath(name).parts
    refused = not parts or name.startswith("/") or ".." in parts or "\\" in name or not name.isprintable()
    path = root / name
    if refused or not path.resolve().is_relative_to(root):
        raise ValueError(f"{where}: path {name[:80]!r} leads out of {root}; allowed are paths below the image folder")
    return path


def torchvision_samples(name, raw_path):
    """Samples of torchvision's own copy of a data set, downloaded where it is missing; as `coop_samples`.

    Raises
    ------
    FileNotFoundError
        It can't be downloaded, or an earlier download was cut off; the message says what to fetch, and where to.
    """
    copy = COPIES[name]
    ensure_torchvision()
    from torchvision import datasets

    absent = [f for f in (raw_path / Path(copy.images).parts[0], raw_path, raw_path.parent) if not f.exists()]

    def load(**split):
        try:
            part = getattr(datasets, copy.factory)(raw_path, download=True, **split)
        except Exception as error:  # network, archive and file system all raise their own
            for folder in absent:  # nothing is left of a download that did not begin
                with suppress(OSError):
                    folder.rmdir()
            reason = str(error).partition("\n")[0][:120]
            raise FileNotFoundError(
                f"{name} is not whole in {raw_path} and could not be downloaded ({reason}); fetch {copy.address} and "
                f"unpack it so that {raw_path / copy.images} exists"
            ) from None
        files = getattr(part, "_image_files", None) or getattr(part, "_images", None)
        pairs = list(zip(files, part._labels, strict=True)) if files else part.samples
        return sorted((str(path), label) for path, label in pairs), part.classes

    if name in ("eurosat", "sun397"):
        everything, classes = load()
        train, test = _draw(everything, *((0.5, 0.3) if name == "eurosat" else (40, 50)))
        total = len(everything)
    else:
        parts = {split: load(split=split) for split in _official(name)}
        classes = parts["test"][1]
        test = parts.pop("test")[0]
        train = [pair for pairs, _ in parts.values() for pair in pairs]
        total = len(train) + len(test)
    root = raw_path / copy.images
    if total != copy.total:
        raise FileNotFoundError(
            f"{root} holds {total} images, expected {copy.total}: a download or an unpacking was cut off; remove "
            f"{raw_path / Path(copy.images).parts[0]} and repeat the command"
        )
    if name == "eurosat":
        classes = [EUROSAT_NAMES.get(each, each) for each in classes]
    if name == "sun397":  # "apartment_building/outdoor" is an outdoor apartment building
        classes = [" ".join(reversed(each.split("/"))) for each in classes]
    sets = [[(Path(p), label, Path(p).relative_to(root).as_posix()) for p, label in pairs] for pairs in (train, test)]
    missing = [name for samples in sets for path, _, name in samples if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} images are not in {root}: {_first(missing)}; an unpacking was cut off: remove "
            f"{raw_path / Path(copy.images).parts[0]} and repeat the command"
        )
    return *sets, list(classes)


def _official(name):
    return {
        "flowers102": ("train", "val", "test"),
        "dtd": ("train", "val", "test"),
        "food101": ("train", "test"),
        "oxfordpets": ("trainval", "test"),
        "fgvc_aircraft": ("train", "test"),
    }[name]


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


def prepare(folder, train, test, class_names, shorter_side=None, workers=0):
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
    workers : int
        Decoding threads, 0 for one per core.

    Raises
    ------
    ValueError
        Images that can't be read (the first ones are named), or another process is preparing this folder.
    """
    partial = folder.parent / f".{folder.name}.partial"
    with _held(partial), closing(_Checked(partial / "checked.lmdb", shorter_side)) as checked:
        bad = checked.check_all({path for path, _, _ in (*train, *test)}, workers)
        if bad:
            raise ValueError(
                f"{len(bad)} images can't be used: {_first(bad, '; ')}; nothing was written but {partial}, which "
                "remembers the good ones"
            )
        for draft in (*partial.glob(".whole.*"), *partial.glob("whole")):
            shutil.rmtree(draft)
        splits = {
            split: ((checked.encoded(path), label, name) for path, label, name in samples)
            for split, samples in (("train", train), ("test", test))
        }
        write_ilmvp(partial / "whole", **splits, class_names=class_names)
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
        self._shorter_side, self._size = shorter_side, 16 << 20
        if path.exists():
            self._size = max(self._size, 2 * path.stat().st_size)
        self._environment = lmdb.open(os.fspath(path), subdir=False, lock=False, map_size=self._size)
        self._unneeded = set()

    def close(self):
        self._environment.close()

    def _key(self, path):
        status = path.stat()
        parts = [os.path.abspath(path), status.st_size, status.st_mtime_ns, self._shorter_side]
        return hashlib.sha256(json.dumps(parts).encode()).digest()

    def _get(self, path):
        with self._environment.begin() as transaction:
            return transaction.get(self._key(path))

    def encoded(self, path):
        """The bytes to store for an image that was found readable."""
        return self._get(path) or path.read_bytes()

    def check_all(self, paths, workers):
        """Check the images that were not checked before; the messages of those that can't be used."""
        todo, bad = iter(sorted(path for path in paths if self._get(path) is None)), []
        threads = workers or os.cpu_count() or 1
        with (
            ThreadPoolExecutor(threads) as pool,
            tqdm(total=len(paths), desc="checking images", unit="img", disable=None) as bar,
        ):
            while chunk := list(islice(todo, _CHUNK)):
                results = list(pool.map(self._try, chunk))
                self._put([(self._key(p), r) for p, r in zip(chunk, results, strict=True) if isinstance(r, bytes)])
                bad += [str(r) for r in results if isinstance(r, ValueError)]
                bar.update(len(chunk))
        return bad

    def _try(self, path):
        try:
            return self._check(path)
        except ValueError as error:
            return error

    def _check(self, path):
        encoded = path.read_bytes()
        stored = open_image(encoded, str(path))
        image = upright(stored)
        scale = min(1, (self._shorter_side or math.inf) / min(image.size))
        if scale == 1 and image is stored:
            if len(encoded) > MAX_RECORD_BYTES - 1024:
                raise ValueError(f"{path}: {len(encoded):,} bytes are too many for a record; use --shorter-side")
            return b""
        size = [max(1, round(side * scale)) for side in image.size]
        lossy = encoded.startswith(b"\xff\xd8") or encoded[8:12] == b"WEBP" or encoded[4:8] == b"ftyp"  # AVIF
        how = {"format": "JPEG", "quality": JPEG_QUALITY, "subsampling": 0} if lossy else {"format": "PNG"}
        stream = io.BytesIO()
        image.resize(size, Image.Resampling.BICUBIC).save(stream, **how, exif=b"")
        return stream.getvalue()

    def _put(self, items):
        while True:
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, value in items:
                        transaction.put(key, value)
                return
            except lmdb.MapFullError:
                self._size *= 2
                self._environment.set_mapsize(self._size)
            except lmdb.Error as error:
                raise OSError(f"{self._environment.path()}: {error}; free some room and repeat the command") from None


def _first(items, separator=", ", limit=3):
    more = f"{separator}and {len(items) - limit} more" if len(items) > limit else ""
    return separator.join(items[:limit]) + more


def _build_parser():
    splits = "\n".join(f"  {name:14}{copy.split}" for name, copy in COPIES.items())
    parser = Parser(
        prog="python -m tools.prepare_data",
        usage="%(prog)s NAME [options]",
        description=__doc__,
        epilog=f"splits of torchvision's copies:\n{splits}",
    )
    parser.add_argument("name", metavar="NAME", help="name of the data set; the folder becomes <data-path>/NAME")
    parser.add_argument("--images", type=Path, metavar="DIR", help="image folder that the paths of --split start from")
    parser.add_argument("--split", type=Path, metavar="FILE", help="split file of CoOp, split_zhou_*.json")
    parser.add_argument(
        "--data-path",
        type=Path,
        default=Path("datasets"),
        metavar="DIR",
        help="folder that holds the data sets (default: datasets)",
    )
    parser.add_argument(
        "--raw-path", type=Path, metavar="DIR", help="where torchvision keeps its own copies (default: <data-path>/raw)"
    )
    parser.add_argument(
        "--shorter-side",
        type=int,
        metavar="N",
        help="shorten larger images to N pixels on the shorter side (default: files as they are); a "
        "few times smaller, but no longer the published pixels",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="decoding threads, 0 for one per core (default: 0); the result does not depend on it",
    )
    return parser


def _samples(arguments):
    name, published = arguments.name, DATASETS.get(arguments.name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"NAME is {name!r}; allowed are letters, digits, '.', '_' and '-'")
    if published is not None and published.open is not open_ilmvp:
        raise ValueError(f"{name} needs no preparation: the scripts read it as it is")
    if (arguments.images is None) != (arguments.split is None):
        raise ValueError("--images and --split go together: the paths of the split file start at the image folder")
    if arguments.workers < 0 or (arguments.shorter_side is not None and arguments.shorter_side < 1):
        raise ValueError("--workers must be 0 or more, --shorter-side 1 or more")
    if arguments.images is not None:
        return coop_samples(arguments.images, arguments.split)
    if name not in COPIES:
        split = f"split_zhou_{SPLIT_FILES[name]}.json" if name in SPLIT_FILES else "FILE"
        raise ValueError(
            f"torchvision's copies that can be prepared are {', '.join(COPIES)}; give {name} as --images DIR --split "
            f"{split} (https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md has images and split files)"
        )
    raw = arguments.raw_path or arguments.data_path / "raw"
    copy = COPIES[name]
    print(f"split: {copy.split}", flush=True)
    if name in SPLIT_FILES:
        print(
            f"which is not the paper's: for its sizes add --images {raw / copy.images} "
            f"--split split_zhou_{SPLIT_FILES[name]}.json (of CoOp)",
            flush=True,
        )
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
    train, test, class_names = _samples(arguments)
    prepare(folder, train, test, class_names, arguments.shorter_side, arguments.workers)
    print(f"{folder}: {len(train)} training and {len(test)} test images, {len(class_names)} classes")
    info = DATASETS.get(arguments.name)
    if info is not None and info.train and (info.train, info.test) != (len(train), len(test)):
        print(f"published: {info.train} training and {info.test} test images, {info.classes} classes")
    name = [arguments.name, "--data-path", str(arguments.data_path)] if info is not None else [f"folder:{folder}"]
    print(
        f"check it: python -m tools.check_data {shlex.quote(str(folder))}; use it: {shlex.join(['--dataset', *name])}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
