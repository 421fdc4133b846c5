"""ILM-VP folders: what is read, what is refused, and that nothing hostile gets further than a ValueError."""

import io
import json
import os
import pickle
import random
import time
import zlib
from collections import Counter
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from data.class_names import clean_class_name
from data.decode import MAX_PIXELS
from data.ilmvp import LmdbSource, check_against_split, read_split, write_ilmvp
from data.restricted_pickle import MAX_RECORD_BYTES, restricted_loads
from tests.data.helpers import edit_split, encoded_image, make_ilmvp, put

REAL_DATA = os.environ.get("BLM_REAL_DATA")


def one_line(error):
    message = str(error.value)
    assert "\n" not in message and len(message) < 1000
    return message


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", [0, -5, 255, 70000, 2**40, "ä", [], (), [1, ("a", [2])], list(range(50))])
def test_restricted_loads_gives_what_was_pickled(value, protocol):
    assert restricted_loads(pickle.dumps(value, protocol), "here", 200) == value


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_restricted_loads_gives_samples_and_keys(protocol):
    keys = [str(i).encode() for i in range(3000)]
    assert restricted_loads(pickle.dumps(keys, protocol), "here", 4 * 3000) == keys
    sample = (bytes(range(256)) * 300, 17)
    assert restricted_loads(pickle.dumps(sample, protocol), "here") == sample


HOSTILE = {
    "os.system": pickle.dumps(Call(os.system, "touch PWNED")),
    "os.system, protocol 0": pickle.dumps(Call(os.system, "touch PWNED"), 0),
    "builtins.eval": pickle.dumps(Call(eval, "open('PWNED', 'w')")),
    "nested in a sample": pickle.dumps((Call(os.system, "touch PWNED"), 3)),
    "reduce of a reduce": pickle.dumps(Call(map, Call(eval, "print"), Call(list, (1,)))),
    "INST": b"(S'touch PWNED'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch PWNED'\no.",
    "GLOBAL alone": b"cos\nsystem\n.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "EXT1": b"\x80\x02\x82\x01.",
    "persistent id": b"Pwhere\n.",
    "BUILD": b"\x80\x04]}b.",
    "dict": pickle.dumps({"a": 1}),
    "set": pickle.dumps({1}),
    "float": pickle.dumps(1.0),
    "bool": pickle.dumps(True),
    "None": pickle.dumps(None),
    "numpy": pickle.dumps(np.int64(3)),
    "bytes of 10 GB": b"\x80\x04\x8e" + (10 << 30).to_bytes(8, "little") + b"abc.",
    "text of 10 GB": b"\x80\x04\x8d" + (10 << 30).to_bytes(8, "little") + b"abc.",
    "bytearray of 10 GB": b"\x80\x05\x96" + (10 << 30).to_bytes(8, "little") + b"abc.",
    "frame of 10 GB": b"\x80\x04\x95" + (10 << 30).to_bytes(8, "little") + b"K\x01.",
    "memo index of 4 billion": b"\x80\x04K\x01r\xff\xff\xff\xff.",
    "memo read of 4 billion": b"\x80\x04j\xff\xff\xff\xff.",
    "number of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "long of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
    "lists 10 million deep": b"\x80\x04" + b"]" * 10_000_000 + b"a" * 9_999_999 + b".",
    "tuples 10 million deep": b"\x80\x04)" + b"\x85" * 10_000_000 + b".",
    "a list in itself": b"\x80\x04]\x94h\x00a" * 40 + b".",
    "nothing": b"",
    "no stop": b"\x80\x04K\x01",
    "stop only": b".",
    "protocol 200": b"\x80\xc8K\x01.",
    "pop from an empty stack": b"\x80\x04a.",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_are_refused_by_name_and_at_once(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="train.lmdb, key b'7': not a safe pickle") as error:
        restricted_loads(HOSTILE[case], "train.lmdb, key b'7'")
    one_line(error)
    assert time.perf_counter() - start < 1
    assert not list(tmp_path.iterdir())


def test_a_record_that_is_too_large_is_not_even_looked_at():
    with pytest.raises(ValueError, match="at most 67,108,864"):
        restricted_loads(bytes(MAX_RECORD_BYTES + 1), "here")


def test_read_back_what_was_written(tmp_path):
    folder = make_ilmvp(tmp_path / "set")
    assert sorted(path.name for path in folder.iterdir()) == ["split.json", "test.lmdb", "train.lmdb"]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    source = LmdbSource(folder / "train.lmdb")
    assert source.keys == [b"0", b"1", b"2", b"3", b"4"] and len(source) == 5
    assert source.labels.tolist() == [0, 0, 1, 2, 1] and source.labels.dtype == np.int64
    assert source.record(3) == (encoded_image(3), 2)
    expected = Image.open(io.BytesIO(encoded_image(3)))
    assert source.image(3).tobytes() == expected.tobytes()
    names, counts = read_split(folder / "split.json")
    assert names == ["hard leaved orchid", "rose", "tulip"]
    assert counts == {"train": Counter({0: 2, 1: 2, 2: 1}), "val": Counter(), "test": Counter([0, 1, 2])}


def test_published_readers_can_read_what_we_write(tmp_path):
    folder = make_ilmvp(tmp_path / "set")
    environment = lmdb.open(str(folder / "test.lmdb"), subdir=False, readonly=True, lock=False)
    with environment.begin() as transaction:
        assert pickle.loads(transaction.get(b"__len__")) == 3
        assert pickle.loads(transaction.get(b"__keys__")) == [b"0", b"1", b"2"]
        assert pickle.loads(transaction.get(b"2")) == (encoded_image(102), 2)
    assert json.loads((folder / "split.json").read_text())["test"][0] == ["0.png", 0, "Hard-leaved_orchid"]


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def samples():
        yield encoded_image(0), 0, "0.png"
        raise RuntimeError("source broke")

    with pytest.raises(RuntimeError, match="source broke"):
        write_ilmvp(tmp_path / "set", train=samples(), test=[], class_names=["a"])
    with pytest.raises(ValueError, match="label 3, but there are 1 class names"):
        write_ilmvp(tmp_path / "set", train=[(b"x", 3, "0.png")], test=[], class_names=["a"])
    with pytest.raises(ValueError, match="no samples for test.lmdb"):
        write_ilmvp(tmp_path / "set", train=[(b"x", 0, "0.png")], test=[], class_names=["a"])
    assert not list(tmp_path.iterdir())
    make_ilmvp(tmp_path / "set")
    with pytest.raises(FileExistsError, match="not empty"):
        make_ilmvp(tmp_path / "set")


def test_the_writer_outgrows_its_first_map(tmp_path):
    big = os.urandom(5 << 20)
    samples = [(big, 0, f"{i}") for i in range(6)]
    write_ilmvp(tmp_path / "set", train=samples, test=samples[:1], class_names=["a"])
    source = LmdbSource(tmp_path / "set/train.lmdb")
    assert all(source.record(i) == (big, 0) for i in range(6))


def test_an_lmdb_folder_is_read_like_a_file(tmp_path):
    with lmdb.open(str(tmp_path / "train.lmdb"), map_size=1 << 20) as environment:
        with environment.begin(write=True) as transaction:
            for key, value in ((b"__len__", 1), (b"__keys__", [b"a"]), (b"a", (encoded_image(0), 4))):
                transaction.put(key, pickle.dumps(value))
    source = LmdbSource(tmp_path / "train.lmdb")
    assert source.labels.tolist() == [4] and source.file.name == "data.mdb"


def test_lmdb_is_opened_lazily_and_may_be_carried_across_a_fork(tmp_path):
    path = make_ilmvp(tmp_path / "set") / "train.lmdb"
    source, other = LmdbSource(path), LmdbSource(path)
    assert source._opened is None
    assert source.record(0) == other.record(0)
    child = os.fork()
    if child == 0:
        fine = False
        try:
            fine = source.record(1) == (encoded_image(1), 0)
        finally:
            os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
    source.close()
    assert source._opened is None and source.record(1) == (encoded_image(1), 0)


def test_missing_lmdb(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.lmdb does not exist") as error:
        LmdbSource(tmp_path / "train.lmdb").labels  # noqa: B018
    one_line(error)
    (tmp_path / "train.lmdb").mkdir()
    with pytest.raises(FileNotFoundError, match=r"data\.mdb does not exist"):
        LmdbSource(tmp_path / "train.lmdb").labels  # noqa: B018


@pytest.mark.parametrize("kept", [0, 1, 100, 4095, 4096, 5000, 8192, 20000, -4096, -1])
def test_half_copied_lmdb(tmp_path, kept):
    path = make_ilmvp(tmp_path / "set") / "train.lmdb"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"train\.lmdb .*half copied; copy or download it again") as error:
        LmdbSource(path).labels  # noqa: B018
    one_line(error)


def test_an_lmdb_whose_end_is_still_zeros(tmp_path):
    path = make_ilmvp(tmp_path / "set") / "train.lmdb"
    whole = path.read_bytes()
    for start in range(8192, len(whole), 4096):
        path.write_bytes(whole[:start] + bytes(len(whole) - start))
        try:
            for i in range(5):
                LmdbSource(path).image(i)
        except ValueError as error:
            assert "train.lmdb" in str(error) and "key" in str(error)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (b"__len__", 10**70, "__len__ is beyond 18 digits"),
        (b"__len__", 6, "__len__ is 6, __keys__ has 5"),
        (b"__len__", 0, "__len__ is 0"),
        (b"__len__", -5, "__len__ is -5"),
        (b"__len__", "5", "holds a str, expected int"),
        (b"__keys__", (b"0", b"1", b"2", b"3", b"4"), "holds a tuple, expected list"),
        (b"__keys__", [b"0"] * 5, "names a key twice"),
        (b"__keys__", ["0", "1", "2", "3", "4"], "other than keys"),
        (b"__keys__", [b"0", b"1", b"2", b"3", b""], "other than keys"),
        (b"__keys__", [b"0", b"1", b"2", b"3", b"k" * 512], "other than keys"),
        (b"__keys__", [b"0", b"1", b"2", b"3", b"nowhere"], "key b'nowhere': no such key"),
        (b"__keys__", [b"%d" % i for i in range(5000)], "more than"),
        (b"3", [encoded_image(0), 0], "key b'3': holds a list, expected tuple"),
        (b"3", (encoded_image(0), 0, 0), r"key b'3': expected \(image bytes, int label\)"),
        (b"3", ("text", 0), r"key b'3': expected \(image bytes, int label\)"),
        (b"3", (encoded_image(0), "0"), r"key b'3': expected \(image bytes, int label\)"),
        (b"3", (encoded_image(0), -1), "key b'3': label -1"),
        (b"3", (encoded_image(0), 10**100), "key b'3': label beyond 18 digits"),
    ],
)
def test_records_that_are_not_what_they_should_be(tmp_path, key, value, message):
    path = make_ilmvp(tmp_path / "set") / "train.lmdb"
    put(path, key, value)
    with pytest.raises(ValueError, match=message) as error:
        LmdbSource(path).labels  # noqa: B018
    assert "train.lmdb" in one_line(error)


def bomb(width, height):
    """A PNG of a few bytes that claims to be large."""
    whole = bytearray(encoded_image(0, (1, 1)))
    whole[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4, "big")
    return bytes(whole)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (encoded_image(0)[:-200], "not a readable image"),
        (encoded_image(0, (64, 64), "JPEG")[:700], "not a readable image"),
        (b"", "not a readable image"),
        (b"no image", "not a readable image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable image"),
        (bomb(100_000, 100_000), "pixels"),
        (bomb(10_000, 10_000), f"at most {MAX_PIXELS:,} pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_named_by_file_and_key(tmp_path, encoded, message):
    path = make_ilmvp(tmp_path / "set") / "train.lmdb"
    put(path, b"3", (encoded, 0))
    source = LmdbSource(path)
    with pytest.raises(ValueError, match=message) as error:
        source.image(3)
    assert "train.lmdb, key b'3'" in one_line(error)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("train"), '"train" is missing or empty'),
        (lambda s: s["test"].clear(), '"test" is missing or empty'),
        (lambda s: s.update(val="text"), "expected an object with the lists"),
        (lambda s: s["train"].append(["a.png", 0]), 'entry 5 of "train" is not'),
        (lambda s: s["train"].append(["a.png", True, "rose"]), 'entry 5 of "train" is not'),
        (lambda s: s["train"].append(["a.png", 1.0, "rose"]), 'entry 5 of "train" is not'),
        (lambda s: s["test"].append([None, 1, "rose"]), 'entry 3 of "test" is not'),
        (lambda s: s["test"].append({"label": 1}), 'entry 3 of "test" is not'),
        (lambda s: s["test"].append(["a.png", -1, "rose"]), "label -1"),
        (lambda s: s["test"].append(["a.png", 2**80, "rose"]), "label beyond 18 digits"),
        (lambda s: s["test"].append(["a.png", 999_999, "far"]), "label 3 has no class name although 999999"),
        (lambda s: s["test"].append(["a.png", 1, "tulip"]), "label 1 is 'tulip' here, 'rose' before"),
        (lambda s: s["test"].append(["a.png", 3, "_"]), "class name is empty"),
        (lambda s: s["test"].append(["a.png", 3, "a\nb"]), "unprintable"),
        (lambda s: s["test"].append(["a.png", 3, "x" * 2000]), "too long"),
    ],
)
def test_bad_split(tmp_path, edit, message):
    folder = make_ilmvp(tmp_path / "set")
    edit_split(folder, edit)
    with pytest.raises(ValueError, match=message) as error:
        read_split(folder / "split.json")
    assert "split.json" in one_line(error)


@pytest.mark.parametrize("text", ["", "{", "[" * 200_000, "[]", "3", '{"train": ' + "9" * 5000 + "}", "\xff"])
def test_split_that_is_no_such_json(tmp_path, text):
    (tmp_path / "split.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"split\.json") as error:
        read_split(tmp_path / "split.json")
    one_line(error)


def test_split_missing_or_too_large(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"split\.json does not exist"):
        read_split(tmp_path / "split.json")
    monkeypatch.setattr("data.ilmvp.MAX_SPLIT_BYTES", 10)
    with pytest.raises(ValueError, match="at most 10 are read"):
        read_split(make_ilmvp(tmp_path / "set") / "split.json")


def test_class_names_come_from_all_splits(tmp_path):
    folder = make_ilmvp(tmp_path / "set")
    edit_split(folder, lambda s: s["val"].append(["../../etc/passwd", 3, "Night-blooming_Cereus"]))
    names, _ = read_split(folder / "split.json")
    assert names == ["hard leaved orchid", "rose", "tulip", "night blooming cereus"]
    assert clean_class_name("Hard-leaved_Orchid") == "hard leaved orchid"


def test_labels_are_compared_whatever_their_order():
    labels = np.array([0, 1, 1, 2])
    check_against_split(labels, Counter([1, 0, 2, 1]), "a.lmdb", "split.json")
    with pytest.raises(ValueError, match="a.lmdb disagrees with split.json: 4 samples against 3"):
        check_against_split(labels, Counter([0, 1, 2]), "a.lmdb", "split.json")
    with pytest.raises(ValueError, match="1 samples of label 0 against 2"):
        check_against_split(labels, Counter([0, 0, 1, 2]), "a.lmdb", "split.json")


def mutate(data, rng):
    """Damage bytes as a transfer or an attacker would: flip, cut, repeat, insert opcodes or lengths."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        how, at = rng.randrange(6), rng.randrange(len(data) + 1)
        near = min(at, 40) if rng.random() < 0.5 else at  # the head of a pickle is where its structure is
        if how == 0 and data:
            data[min(near, len(data) - 1)] = rng.randrange(256)
        elif how == 1:
            del data[near:]
        elif how == 2:
            data[near:near] = rng.randbytes(rng.randrange(9))
        elif how == 3:
            data[near:near] = data[: rng.randrange(60)]
        elif how == 4:
            del data[near : near + rng.randrange(9)]
        else:
            data[near:near] = rng.choice(
                (b"cos\nsystem\n", b"\x93", b"R", b"\x8e", b"r\xff\xff\xff\xff", b"]a", b"(", b"t")
            )
    return bytes(data)


def fuzz(folder, count, seed):
    """Read `count` mutated records, images included, and count / 10 mutated split files."""
    rng = random.Random(seed)
    path = folder / "train.lmdb"
    with lmdb.open(str(path), subdir=False, lock=False, map_size=64 << 20, sync=False) as environment:
        with environment.begin() as transaction:
            whole = {key: bytes(value) for key, value in transaction.cursor()}
    split = (folder / "split.json").read_bytes()
    outcomes = Counter()

    def attempt(action):
        try:
            action()
            outcomes["read"] += 1
        except ValueError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1

    def write(values):
        with lmdb.open(str(path), subdir=False, lock=False, map_size=64 << 20, sync=False) as environment:
            with environment.begin(write=True) as transaction:
                for key, value in values.items():
                    transaction.put(key, value or b"\0")

    def read(expected):
        source = LmdbSource(path)
        attempt(lambda: source.labels)
        for i in range(expected):
            attempt(lambda i=i: source.record(i))
            attempt(lambda i=i: source.image(i))

    keys = [b"m%d" % i for i in range(50)]
    for _ in range(count // 50):
        mutants = {key: mutate(whole[rng.choice((b"0", b"1", b"2"))], rng) for key in keys}
        write({**mutants, b"__keys__": pickle.dumps(keys), b"__len__": pickle.dumps(50)})
        read(50)
        write({key: mutate(whole[key], rng) for key in (b"__keys__", b"__len__")})
        read(0)
        for _ in range(5):
            (folder / "split.json").write_bytes(mutate(split, rng))
            attempt(lambda: read_split(folder / "split.json"))
    return outcomes


def make_fuzzed(tmp_path):
    names = ["a", "b", "c"]
    samples = [
        (encoded_image(0, (9, 7)), 0, "0.png"),
        (encoded_image(1, (24, 24), "JPEG"), 1, "1.jpg"),
        (encoded_image(2, (8, 8), "WEBP"), 2, "2.webp"),
    ]
    write_ilmvp(tmp_path / "set", train=samples, test=samples, class_names=names)
    return tmp_path / "set"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:invalid escape:DeprecationWarning")
def test_fuzzed_records_and_splits_give_a_result_or_our_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes = fuzz(make_fuzzed(tmp_path), 2000, seed=0)
    assert outcomes["read"] > 100 and outcomes["refused"] > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:invalid escape:DeprecationWarning")
def test_fuzzed_records_and_splits_at_length(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcomes = fuzz(make_fuzzed(tmp_path), 100_000, seed=1)
    print(dict(outcomes))
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.skipif(not REAL_DATA, reason="BLM_REAL_DATA names no folder with flowers102")
def test_real_flowers():
    folder = Path(REAL_DATA) / "flowers102"
    names, counts = read_split(folder / "split.json")
    assert len(names) == 89 and names[0] == "hard leaved pocket orchid"
    for split, each in (("train", 16), ("test", 10)):
        source = LmdbSource(folder / f"{split}.lmdb")
        assert Counter(source.labels.tolist()) == counts[split] == {label: each for label in range(89)}
        assert min(source.image(0).size) == 200
