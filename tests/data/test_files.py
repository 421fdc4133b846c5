"""Files are there whole or not at all, with the mode that the umask gives, and errors name them."""

import errno
import os

import pytest

from data.files import read_json, write_json, write_text, written_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with written_whole(path) as draft:
        draft.write_text("after")
        assert path.read_text() == "before" and draft.parent == tmp_path and draft.name.startswith(".a.txt.")
    assert path.read_text() == "after" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_those_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", {"a": 1})
        with written_whole(tmp_path / "folder", folder=True) as draft:
            (draft / "b.txt").write_text("b")
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask
    assert read_json(tmp_path / "a.json") == {"a": 1} and names(tmp_path / "folder") == ["b.txt"]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad"), OSError(errno.ENOSPC, "No space left")])
def test_nothing_is_left_of_a_block_that_fails(tmp_path, folder, error):
    path = tmp_path / "a"
    expected = type(error)
    with pytest.raises(expected) as caught, written_whole(path, folder=folder) as draft:
        (draft / "b" if folder else draft).write_text("half")
        raise error
    assert names(tmp_path) == []
    if expected is OSError:
        assert str(caught.value) == f"could not write {path}: No space left; what was there is untouched"


def test_an_error_names_the_file_that_could_not_be_written(tmp_path):
    with pytest.raises(OSError, match=r"could not write .*/absent/a\.txt: No such file or directory; what"):
        write_text(tmp_path / "absent" / "a.txt", "text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(OSError, match="could not write .*/full: Directory not empty"):
        with written_whole(tmp_path / "full", folder=True):
            pass
    assert names(tmp_path) == ["full"] and names(tmp_path / "full") == ["mine"]


def test_drafts_of_killed_processes_go_after_a_day(tmp_path):
    for name in (".a.old.tmp", ".a.new.tmp", ".b.old.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
    for name in (".a.old.tmp", ".b.old.tmp"):
        os.utime(tmp_path / name, (0, 0))
    write_text(tmp_path / "a", "text")
    assert names(tmp_path) == [".a.new.tmp", ".b.old.tmp", "a"]


def test_two_at_once_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "a"
    with written_whole(path) as first, written_whole(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and names(tmp_path) == ["a"]
