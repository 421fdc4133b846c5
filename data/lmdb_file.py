"""Read LMDB files from strangers without trusting a number in them.

liblmdb follows the page numbers of the B-tree through a memory map, unchecked: one flipped byte can end the process
with SIGBUS. Here every page is a bounded read whose header has to fit, so that a damaged file is a ValueError.

Layout (little-endian, as liblmdb 0.9 writes on machines of 64 bit)::

    page      number u64, unused u16, flags u16, lower u16, upper u16; then a u16 offset per node, up to `lower`
    branch    nodes of low u16, high u16, higher u16, key size u16, key: the child's page number from three parts
    leaf      nodes of low u16, high u16, flags u16, key size u16, key: the value's size from two parts, then the
              value, or with flag 1 the number u64 of the first of the pages that hold it
    overflow  a page header with the number of pages u32 in the place of lower and upper, then the value
    meta      pages 0 and 1, the one of the later transaction counts: magic u32, version u32, address u64, map size
              u64, the databases of free pages and of data, last page u64, transaction u64
    database  page size u32 (in the first), flags u16, depth u16, u64 each: branch, leaf and overflow pages, entries,
              root page
"""

import os
import struct
import weakref
from bisect import bisect_left, bisect_right

_PAGE = struct.Struct("<Q2xHHH")
_OVERFLOW = struct.Struct("<Q2xHI")
_NODE = struct.Struct("<HHHH")
_META = struct.Struct("<II16x" + "IHH24xQQ" * 2 + "QQ")
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOWS, _IS_META, _KINDS = 0x01, 0x02, 0x04, 0x08, 0x6F  # flags of pages
_ON_OVERFLOW_PAGES = 0x01  # the only flag of a node that is plain data
_NO_PAGE = 2**64 - 1
_MAX_DEPTH = 32  # as in liblmdb


class LmdbFile:
    """The data of one LMDB file, open for reading; threads and forked processes may share it.

    Parameters
    ----------
    path : str or Path

    Attributes
    ----------
    entries : int
        How many there are, by the file's own account.

    Raises
    ------
    ValueError
        It is no such file, damaged or cut off.
    OSError
        It can't be opened.
    """

    def __init__(self, path):
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._page_size = 4096  # until page 0 says otherwise
        first = self._meta(0)
        self._page_size = first[2]
        if self._page_size not in [2**power for power in range(8, 16)]:
            raise ValueError(f"page size {self._page_size}")
        newest = max(first, self._meta(1), key=lambda meta: meta[-1])
        _, _, _, _, _, _, _, _, flags, _, self.entries, self._root, last_page, _ = newest
        if flags:
            raise ValueError(f"a database with flags {flags:#x}")
        size, needed = os.fstat(self._file).st_size, (last_page + 1) * self._page_size
        if size < needed:
            raise ValueError(f"{size:,} bytes, and should have at least {needed:,}")

    def get(self, key, max_bytes):
        """The value of `key` (bytes), or None; ValueError where it is longer than `max_bytes` or out of reach."""
        number = self._root
        for _ in range(_MAX_DEPTH):
            if number == _NO_PAGE:
                return None
            page = self._read(number * self._page_size, self._page_size)
            stored_number, flags, lower, upper = _PAGE.unpack_from(page)
            count = (lower - _PAGE.size) // 2
            if stored_number != number or count < 1 or not lower <= upper <= self._page_size:
                raise ValueError(f"page {number} is damaged")
            offsets = struct.unpack_from(f"<{count}H", page, _PAGE.size)
            if flags & _KINDS == _BRANCH:  # the first node's key is left out: it stands for all that are smaller
                child = bisect_right(offsets, key, lo=1, key=lambda offset: self._node(page, offset)[3]) - 1
                low, high, higher, _, _ = self._node(page, offsets[child])
                number = low | high << 16 | higher << 32
            elif flags & _KINDS == _LEAF:
                place = bisect_left(offsets, key, key=lambda offset: self._node(page, offset)[3])
                found = self._node(page, offsets[place]) if place < count else None
                if found is None or found[3] != key:
                    return None
                return self._value(page, *found, max_bytes)
            else:
                raise ValueError(f"page {number} is damaged")
        raise ValueError("its pages go in circles")

    def _value(self, page, low, high, flags, _, start, max_bytes):
        size = low | high << 16
        if size > max_bytes:
            raise ValueError(f"{size:,} bytes; at most {max_bytes:,} are read")
        if flags == 0 and start + size <= len(page):
            return page[start : start + size]
        if flags != _ON_OVERFLOW_PAGES or start + 8 > len(page):
            raise ValueError("its node is damaged")
        number = int.from_bytes(page[start : start + 8], "little")
        at = number * self._page_size
        stored_number, kind, pages = _OVERFLOW.unpack(self._read(at, _OVERFLOW.size))
        if stored_number != number or not kind & _OVERFLOWS or pages * self._page_size < _OVERFLOW.size + size:
            raise ValueError(f"page {number} is damaged")
        return self._read(at + _OVERFLOW.size, size)

    @staticmethod
    def _node(page, offset):
        """Its three numbers, its key, and where its value starts."""
        if offset + _NODE.size > len(page):
            raise ValueError("a node is damaged")
        low, high, flags, key_size = _NODE.unpack_from(page, offset)
        start = offset + _NODE.size
        return low, high, flags, page[start : start + key_size], start + key_size

    def _meta(self, number):
        page = self._read(number * self._page_size, _PAGE.size + _META.size)
        meta = _META.unpack_from(page, _PAGE.size)
        if not _PAGE.unpack_from(page)[1] & _IS_META or meta[:2] != (_MAGIC, _VERSION):
            raise ValueError("no meta page of an LMDB")
        return meta

    def _read(self, at, size):
        if at + size > os.fstat(self._file).st_size:  # before memory is taken for it
            raise ValueError("it ends before one of its pages")
        data = os.pread(self._file, size, at)
        if len(data) != size:  # cut meanwhile, or a file system that gives less than was asked for
            raise ValueError("it ends before one of its pages")
        return data
