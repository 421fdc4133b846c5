"""python -m tools.check_data datasets/flowers102

Check that a data set is whole: every image is read and decoded, images of one colour are named, labels and numbers are
compared with split.json and with the published sizes. PATH is an ILM-VP folder, or one with train/<class>/* and
test/<class>/*, or with <class>/* alone; --dataset NAME takes any data set that can be trained on, those of the paper
under --data-path (those of torchvision are downloaded where they are missing).

Exit code 0 where all is well, 1 with a list of findings, 2 where there is nothing to check. About 200 photographs a
second and core.
"""

import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tools.console import Parser, one_line_warnings, user_errors
from data import DATASETS, check_dataset_name, clean_class_name
from data.decode import open_image
from data.ilmvp import LmdbSource, check_against_split, read_split
from data.memory import num_cores
from data.registry import FOLDER_PREFIX, find_folder, open_ilmvp
from data.sources import BadFolders, class_folders
from tools.training.plugins import load_plugin_of


def check_folder(path, name=None):
    """Findings about a folder of images.

    Parameters
    ----------
    path : Path
        ILM-VP folder, or one with ``train/<class>/*`` and ``test/<class>/*``, or with ``<class>/*``.
    name : str, optional
        Data set whose published sizes are compared, where there are any.

    Returns
    -------
    summary : str
    findings : list of str
        Empty where all is well.

    Raises
    ------
    FileNotFoundError
        There is no such folder, or it is none of these.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder; give the folder of a data set, or --dataset NAME")
    parts = ("train.lmdb", "test.lmdb", "split.json")
    if any((path / part).exists() for part in parts):
        sources = {split: LmdbSource(path / f"{split}.lmdb") for split in ("train", "test")}
        return _check(path.name, sources, DATASETS.get(name), path / "split.json")
    try:
        train, test, class_names = class_folders(path)
    except BadFolders as error:
        return str(path), error.faults
    return _check(path.name, {"train": train, "test": test}, DATASETS.get(name), class_names=class_names)


def check_named(name, data_path=None):
    """Findings about a data set that can be trained on; as `check_folder`."""
    check_dataset_name(name)
    if name not in DATASETS:
        return check_folder(find_folder(name, data_path))
    data_path = Path(data_path or "datasets")
    info, folder = DATASETS[name], data_path / name
    if info.open is open_ilmvp and folder.is_dir():  # more is said of damaged ones
        return check_folder(folder, name)
    class_names, train, test, *_ = info.open(name, data_path)
    return _check(name, {"train": train, "test": test}, info, class_names=class_names)


def _check(title, sources, published, split_file=None, class_names=None):
    findings, labels, counts = [], {}, None
    if split_file is not None:
        try:
            class_names, counts = read_split(split_file)
        except (FileNotFoundError, ValueError) as error:
            findings.append(str(error))
    for split, source in sources.items():
        if source is None:
            continue
        try:
            labels[split], bad = _examine(source)
        except (FileNotFoundError, ValueError) as error:  # the file as a whole
            findings.append(str(error))
            continue
        finally:
            source.close()
        findings += bad
        readable = labels[split][labels[split] >= 0]
        if counts is not None and len(readable) == len(labels[split]):
            try:
                check_against_split(readable, counts[split], source.file, split_file)
            except ValueError as error:
                findings.append(str(error))
    numbers = {split: len(found) for split, found in labels.items()}
    if class_names is not None:
        findings += _check_classes(class_names, labels.get("train"))
        numbers["classes"] = len(class_names)
    if published is not None:
        findings += [f"{number}; another split, or not whole" for number in published.unlike(**numbers)]
    sizes = [f"{len(found)} {split} images" for split, found in labels.items()]
    sizes += [] if class_names is None else [f"{len(class_names)} classes"]
    sizes += ["no test images: train with --test-fraction"] if sources["test"] is None else []
    return f"{title}: {', '.join(sizes) or 'nothing readable'}", findings


def _examine(source):
    """Labels ((N,) int64, -1 where the record is unreadable) and the messages of all unreadable or empty images."""
    lmdb = isinstance(source, LmdbSource)

    def examine(i):
        label = -1
        try:
            if lmdb:
                encoded, label = source.record(i)
                image = open_image(encoded, source.where(i))
            else:
                label = int(source.labels[i])
                image = source.image(i)
        except (OSError, ValueError) as error:
            return label, str(error)
        if all(low == high for low, high in image.getextrema()):
            return label, f"{source.where(i)}: all pixels are {image.getpixel((0, 0))}; replace or remove this image"
        return label, None

    with ThreadPoolExecutor(num_cores()) as pool:
        examined = pool.map(examine, range(len(source)))
        results = list(tqdm(examined, f"checking {source.title}", len(source), unit="img", disable=None))
    labels = np.array([label for label, _ in results], dtype=np.int64)
    return labels, [message for _, message in results if message]


def _check_classes(class_names, train_labels):
    findings = []
    cleaned = Counter(clean_class_name(name) for name in class_names)
    findings += [f"{times} classes are named {name!r}" for name, times in cleaned.items() if times > 1]
    findings += [f"one class, {class_names[0]!r}; expected two or more to tell apart"] if len(class_names) == 1 else []
    if train_labels is not None:
        empty = sorted(set(range(len(class_names))) - set(train_labels.tolist()))
        findings += [f"class {label}, {class_names[label]!r}, has no training image" for label in empty]
    return findings


@user_errors()
def main(argv=None):
    parser = Parser(prog="python -m tools.check_data", usage="%(prog)s PATH | --dataset NAME", description=__doc__)
    add = parser.add_argument
    text = "folder to check; its name tells which published sizes it should have, where it is one of the paper's"
    add("path", nargs="?", metavar="PATH", help=text)
    add("--dataset", metavar="NAME", help="check the data set that the scripts train on by this name")
    text = "with --dataset: folder that holds the data sets (default: datasets), or a moved folder:PATH"
    add("--data-path", type=Path, metavar="DIR", help=text)
    add("--plugin", metavar="FILE", help="Python file that registers a data set of your own")
    load_plugin_of(argv)
    args = parser.parse_args(argv)
    with one_line_warnings():
        if (args.path is None) == (args.dataset is None):
            raise ValueError("give either PATH or --dataset NAME")
        if args.path is not None and args.data_path is not None:
            raise ValueError("--data-path goes with --dataset NAME; PATH is taken as it is")
        if args.dataset is None:
            path = Path(args.path.removeprefix(FOLDER_PREFIX)).expanduser()
            summary, findings = check_folder(path, Path(os.path.realpath(path)).name)
        else:
            summary, findings = check_named(args.dataset, args.data_path)
    print(summary)
    for finding in findings:
        print(f"- {finding}")
    print("all is well" if not findings else f"{len(findings)} finding{'s' * (len(findings) > 1)}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
