"""ILM-VP folders: ``train.lmdb``, ``test.lmdb`` and ``split.json``, read without trusting them, and written.

========== =================================================
LMDB key   value
========== =================================================
__len__    pickled int, number of samples
__keys__   pickled list of bytes, the keys of the samples
each key   pickled (encoded image as bytes, label as int)
========== =================================================

``split.json`` has the lists "train", "val" and "test" of [path, label, class name]; its paths are never
opened.
"""

import json
import os
import pickle
from collections import Counter
from pathlib import Path

import lmdb
import numpy as np

from data.class_names import clean_class_name
from data.decode import open_image
from data.files import printable, written_whole
from data.lmdb_file import LmdbFile
from data.restricted_pickle import MAX_RECORD_BYTES, restricted_loads
from data.sources import file_stamp

MAX_SPLIT_BYTES = 256 << 20
MAX_CLASSES = 1_000_000
MAX_SAMPLES = 100_000_000


def _short(key):
    return repr(key if len(key) <= 40 else key[:40])


class LmdbSource:
    """Images and labels of one LMDB, in the order of its ``__keys__``; nothing is opened before the first read.

    Parameters
    ----------
    path : str or Path
        LMDB file, or a folder that holds ``data.mdb``.

    Raises
    ------
    FileNotFoundError, ValueError
        On the first read: no such file, no whole LMDB, a record that is not what it should be.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._opened = self._index = self._labels = None

    @property
    def file(self):
        """The file that holds the data."""
        return self.path / "data.mdb" if self.path.is_dir() else self.path

    @property
    def title(self):
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def place(self):
        """Where the data are, as a text that tells sources apart."""
        return os.path.abspath(self.path)

    def require(self):
        """Raise a FileNotFoundError where there is no such file, without opening it."""
        if not self.file.is_file():
            raise FileNotFoundError(
                f"{self.file} does not exist; an ILM-VP folder holds train.lmdb, test.lmdb and split.json"
            )

    def fingerprint(self):
        """Changes when the file does: path, size in bytes, modification time in ns."""
        return file_stamp(self.file)

    def _open(self):
        if self._opened is None:
            self.require()
            try:
                self._opened = LmdbFile(self.file)
            except ValueError as error:
                reason = f"is not an LMDB file ({error}); it is damaged or only half copied"
                raise ValueError(f"{self.file} {reason}; copy or download it again") from None
        return self._opened

    def _record(self, key, kind, max_opcodes=64):
        where, opened = f"{self.file}, key {_short(key)}", self._open()
        try:
            value = opened.get(key, MAX_RECORD_BYTES)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; copy or download this file again") from None
        if value is None:
            raise ValueError(f"{where}: no such key; the file is not a whole ILM-VP LMDB, prepare it again")
        record = restricted_loads(value, where, max_opcodes)
        if type(record) is not kind:
            found = type(record).__name__
            raise ValueError(f"{where}: holds a {found}, expected {kind.__name__}; prepare this file again")
        return record

    @property
    def keys(self):
        """list of bytes : keys of the samples."""
        if self._index is None:
            entries = min(self._open().entries, self.file.stat().st_size // 16)
            count = self._record(b"__len__", int)
            keys = self._record(b"__keys__", list, max_opcodes=64 + 4 * entries)
            if not 0 < count <= min(entries, MAX_SAMPLES) or count != len(keys):
                raise ValueError(
                    f"{self.file}: __len__ is {_bounded(count)}, __keys__ has {len(keys)} and "
                    f"the file {entries} entries; expected one number above 0; prepare this file again"
                )
            if not all(type(key) is bytes and 0 < len(key) <= 511 for key in keys):
                raise ValueError(f"{self.file}: __keys__ holds something other than keys; prepare it again")
            if len(set(keys)) != count:
                raise ValueError(f"{self.file}: __keys__ names a key twice; prepare this file again")
            self._index = keys
        return self._index

    def __len__(self):
        return len(self.keys)

    @property
    def names(self):
        """list of str : the keys, readable."""
        return [printable(key.decode("utf-8", "backslashreplace")) for key in self.keys]

    def where(self, i):
        """Name sample `i` in a message."""
        return f"{self.file}, key {_short(self.keys[i])}"

    def record(self, i):
        """Encoded image (bytes) and label (int, 0 to `MAX_CLASSES` - 1) of sample `i`."""
        record = self._record(self.keys[i], tuple)
        if len(record) != 2 or type(record[0]) is not bytes or type(record[1]) is not int:
            raise ValueError(f"{self.where(i)}: expected (image bytes, int label); prepare this file again")
        if not 0 <= record[1] < MAX_CLASSES:
            found = f"label {_bounded(record[1])}, expected 0 to {MAX_CLASSES - 1}"
            raise ValueError(f"{self.where(i)}: {found}; prepare this file again")
        return record

    @property
    def labels(self):
        """numpy.ndarray : (N,) int64, in the order of `keys`."""
        if self._labels is None:
            self._labels = np.array([self.record(i)[1] for i in range(len(self))], dtype=np.int64)
        return self._labels

    def image(self, i):
        """Image of sample `i`, a PIL image in mode RGB."""
        return open_image(self.record(i)[0], self.where(i))

    def close(self):
        """Let go of the file; the next read opens it again."""
        self._opened = None


def _bounded(number):
    """A hostile int as text: Python refuses to print very long ones."""
    return str(number) if abs(number) < 10**18 else "beyond 18 digits"


def read_split(path):
    """Class names and label counts of a ``split.json``.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    class_names : list of str
        Cleaned name of each label 0 to T-1, gathered from all splits.
    counts : dict of str to Counter
        For "train", "val" and "test", how often each label occurs.

    Raises
    ------
    FileNotFoundError, ValueError
        Missing, too large, or anything but such a file.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; expected a JSON file of the images' labels and class names")
    again = "fetch or prepare it again"
    if path.stat().st_size > MAX_SPLIT_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_SPLIT_BYTES:,} are read; {again}")
    try:
        splits = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(f"{path} is not valid JSON ({type(error).__name__}: {reason}); {again}") from None
    if not isinstance(splits, dict) or not all(isinstance(splits.get(s, []), list) for s in ("train", "val", "test")):
        raise ValueError(f'{path}: expected an object with the lists "train", "val" and "test"; {again}')
    for required in ("train", "test"):
        if not splits.get(required):
            raise ValueError(f'{path}: "{required}" is missing or empty; {again}')
    names, counts = {}, {}
    for split in ("train", "val", "test"):
        counts[split] = Counter()
        for i, entry in enumerate(splits.get(split, [])):
            where = f'{path}: entry {i} of "{split}"'
            if not isinstance(entry, list) or [type(value) for value in entry] != [str, int, str]:
                raise ValueError(f"{where} is not [path, label, class name]; {again}")
            label, name = entry[1], clean_class_name(entry[2])
            if not 0 <= label < MAX_CLASSES:
                raise ValueError(f"{where}: label {_bounded(label)}, expected 0 to {MAX_CLASSES - 1}; {again}")
            if not name.strip() or len(name) > 1000 or not name.isprintable():
                raise ValueError(f"{where}: the class name is empty, too long or unprintable; {again}")
            if names.setdefault(label, name) != name:
                raise ValueError(f"{where}: label {label} is {name[:60]!r} here, {names[label][:60]!r} before; {again}")
            counts[split][label] += 1
    missing = next((label for label in range(len(names)) if label not in names), None)
    if missing is not None:
        raise ValueError(f"{path}: label {missing} has no class name although {max(names)} has one; {again}")
    return [names[label] for label in range(len(names))], counts


def check_against_split(labels, counts, lmdb_file, split_file):
    """Compare the labels of an LMDB with what ``split.json`` says of that split, whatever the order.

    Raises
    ------
    ValueError
        Other numbers of samples, or another number for a label.
    """
    found = Counter(labels.tolist())
    if found == counts:
        return
    total, expected = found.total(), counts.total()
    if total != expected:
        difference = f"{total} samples against {expected}"
    else:
        label = min(label for label in found.keys() | counts.keys() if found[label] != counts[label])
        difference = f"{found[label]} samples of label {label} against {counts[label]}"
    raise ValueError(f"{lmdb_file} disagrees with {split_file}: {difference}; take both from one source")


def write_ilmvp(folder, *, train, test, class_names):
    """Write an ILM-VP folder that the published readers open too.

    The folder appears whole or not at all.

    Parameters
    ----------
    folder : str or Path
        Must not exist yet, or be empty.
    train, test : iterable of (bytes, int, str)
        Encoded image, label, and the name to give it in ``split.json`` (a path, say).
    class_names : sequence of str
        Name of each label.

    Raises
    ------
    FileExistsError
        `folder` holds something already.
    ValueError
        No samples, or a label without a class name.
    OSError
        The disk is full or refuses; nothing is left behind.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name a new folder or remove this one first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(folder, folder=True) as draft:
        splits = {"train": [], "val": [], "test": []}
        for split, samples in (("train", train), ("test", test)):
            for name, label in _write_lmdb(draft / f"{split}.lmdb", samples, len(class_names)):
                splits[split].append([name, label, class_names[label]])
        (draft / "split.json").write_text(json.dumps(splits), encoding="utf-8")


def _write_lmdb(path, samples, num_classes):
    """Write one split; return the (name, label) of its samples."""
    listed, pending, pending_bytes = [], [], 0
    options = {"subdir": False, "lock": False, "sync": False, "metasync": False, "mode": 0o666}
    with lmdb.open(os.fspath(path), map_size=16 << 20, **options) as environment:
        for i, (encoded, label, name) in enumerate(samples):
            if not 0 <= label < num_classes:
                raise ValueError(f"{name}: label {label}, but there are {num_classes} class names")
            listed.append((str(name), int(label)))
            pending.append((str(i).encode(), pickle.dumps((bytes(encoded), int(label)), protocol=4)))
            pending_bytes += len(encoded)
            if pending_bytes > 8 << 20:
                put_all(environment, pending)
                pending, pending_bytes = [], 0
        if not listed:
            raise ValueError(f"no samples for {path.name}; expected at least one")
        keys = [str(i).encode() for i in range(len(listed))]
        heads = {b"__len__": len(keys), b"__keys__": keys}
        put_all(environment, [*pending, *((key, pickle.dumps(value, protocol=4)) for key, value in heads.items())])
        environment.sync(True)
    return listed


def put_all(environment, items):
    """Put (key, value) pairs into an open LMDB, all or none, whose map grows as they need it."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in items:
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])
        except lmdb.Error as error:  # the disk is full, most likely
            raise OSError(f"could not write {environment.path()}: {error}; free some room and try again") from None
