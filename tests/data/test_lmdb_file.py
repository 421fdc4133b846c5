"""The LMDB reader beside liblmdb, and damaged files, which liblmdb would follow into a SIGBUS."""

import os
import random
from collections import Counter

import lmdb
import pytest

from data.ilmvp import LmdbSource, write_ilmvp
from data.lmdb_file import LmdbFile
from tests.data.helpers import encoded_image

REAL_DATA = os.environ.get("BLM_REAL_DATA")


def written(path, items, deleted=()):
    with lmdb.open(str(path), subdir=False, lock=False, map_size=256 << 20, sync=False) as environment:
        for start in range(0, len(items), 500):  # several transactions leave free pages and both meta pages in use
            with environment.begin(write=True) as transaction:
                for key, value in items[start : start + 500]:
                    transaction.put(key, value)
        with environment.begin(write=True) as transaction:
            for key in deleted:
                transaction.delete(key)
    return path


@pytest.mark.parametrize("count", [0, 1, 2, 30, 3000])
@pytest.mark.parametrize("largest", [30, 3000, 40_000])
def test_values_are_those_of_liblmdb(tmp_path, count, largest):
    rng = random.Random(count + largest)
    keys = list({rng.randbytes(rng.choice((1, 5, 40, 511))) for _ in range(count)})
    items = [(key, rng.randbytes(rng.randrange(largest if i % 7 else 4))) for i, key in enumerate(keys)]
    path = written(tmp_path / "a.lmdb", items, deleted=keys[::5])
    file = LmdbFile(path)
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as environment:
        assert file.entries == environment.stat()["entries"]
        with environment.begin() as transaction:
            asked = keys + [key[:-1] + b"x" for key in keys] + [key + b"\0" for key in keys]
            for key in (*asked, b"", b"\0", b"\xff" * 511):
                assert file.get(key, 1 << 20) == (transaction.get(key) if 0 < len(key) <= 511 else None)


def test_long_values_are_refused_before_they_are_read(tmp_path):
    file = LmdbFile(written(tmp_path / "a.lmdb", [(b"long", bytes(5000)), (b"short", bytes(50))]))
    assert file.get(b"long", 5000) == bytes(5000)
    for key, size in ((b"long", "5,000"), (b"short", "50")):
        with pytest.raises(ValueError, match=f"{size} bytes; at most 49 are read"):
            file.get(key, 49)


def test_what_is_no_plain_value_is_refused(tmp_path):
    with lmdb.open(str(tmp_path / "b.lmdb"), subdir=False, lock=False, max_dbs=1) as environment:
        environment.open_db(b"named")
    with pytest.raises(ValueError, match="its node is damaged"):
        LmdbFile(tmp_path / "b.lmdb").get(b"named", 1000)


def damage(whole, rng):
    """Flip, overwrite or cut bytes, half of them in the heads of pages and in the nodes of tree pages."""
    whole = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(whole))
        if rng.random() < 0.7:
            at = min(at - at % 4096 + rng.choice((0, 8, 10, 12, 14, 16, 18, 24, rng.randrange(200))), len(whole) - 1)
        how = rng.random()
        if how < 0.5:
            whole[at] ^= 1 << rng.randrange(8)
        elif how < 0.9:
            size = rng.choice((1, 2, 4, 8))
            whole[at : at + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))[: len(whole) - at]
        elif how < 0.95:
            a, b = (4096 * rng.randrange(len(whole) // 4096) for _ in range(2))
            whole[a : a + 4096] = whole[b : b + 4096]
        else:
            del whole[at:]
            break
    return bytes(whole)


def fuzz(folder, count, seed):
    """Read `count` damaged copies of the folder's ``train.lmdb``, images included."""
    sizes = [(60, 40) if i % 9 == 0 else (9 + i % 40, 7) for i in range(60)]  # the large ones on pages of their own
    samples = [(encoded_image(i, size), i % 3, f"{i}.png") for i, size in enumerate(sizes)]
    write_ilmvp(folder, train=samples, test=samples[:1], class_names=["a", "b", "c"])
    path, rng, outcomes = folder / "train.lmdb", random.Random(seed), Counter()
    whole = path.read_bytes()
    for _ in range(count):
        path.write_bytes(damage(whole, rng))
        source = LmdbSource(path)
        try:
            for i in range(len(source)):
                source.image(i)
            assert source.labels.max() < 1_000_000
            outcomes["read"] += 1
        except ValueError as error:
            assert "train.lmdb" in str(error) and "\n" not in str(error) and len(str(error)) < 1000
            outcomes["refused"] += 1
    return outcomes


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Corrupt EXIF")
def test_damaged_files_give_a_result_or_our_error(tmp_path):
    outcomes = fuzz(tmp_path / "set", 200, seed=0)
    assert outcomes["refused"] > 50 and outcomes["read"] > 10


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Corrupt EXIF")
def test_damaged_files_at_length(tmp_path):
    print(dict(fuzz(tmp_path / "set", 10_000, seed=1)))


@pytest.mark.skipif(not REAL_DATA, reason="BLM_REAL_DATA names no folder with flowers102")
def test_real_flowers_are_read_as_liblmdb_reads_them():
    path = f"{REAL_DATA}/flowers102/train.lmdb"
    file = LmdbFile(path)
    with lmdb.open(path, subdir=False, readonly=True, lock=False) as environment, environment.begin() as transaction:
        assert file.entries == 1426
        assert all(file.get(key, 1 << 26) == value for key, value in transaction.cursor())
