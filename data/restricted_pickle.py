"""Pickles from strangers: int, bytes, str, list and tuple, and nothing else."""

import io
import pickle
import pickletools

MAX_RECORD_BYTES = 64 << 20
# All that a pickle of int, bytes, str, list and tuple consists of in protocols 2 to 5. Nothing here can name
# a class, call anything, or (unlike the text opcodes of protocol 0) take long over a number.
_OPCODES = frozenset(
    "PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET "
    "BININT BININT1 BININT2 LONG1 SHORT_BINBYTES BINBYTES BINBYTES8 "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3".split()
)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")


def restricted_loads(data, where, max_opcodes=64):
    """Unpickle int, bytes, str, list and tuple, and nothing else.

    The opcodes are checked before anything is executed: sizes lie within the data, so that a few bytes can't
    ask for gigabytes, and memo indices count up, since the C unpickler allocates a table up to the largest
    one.

    Parameters
    ----------
    data : bytes-like
        At most `MAX_RECORD_BYTES`.
    where : str
        Names file and key in error messages.
    max_opcodes : int
        Length of the longest pickle to go through; a sample takes about ten.

    Raises
    ------
    ValueError
        Anything else is in there, or the data are damaged.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"{where}: record of {len(data):,} bytes; at most {MAX_RECORD_BYTES:,} are read")
    data, memo = bytes(data), 0
    try:
        for steps, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if steps >= max_opcodes:
                raise pickle.UnpicklingError(f"more than {max_opcodes} opcodes")
            if opcode.name not in _OPCODES:
                raise pickle.UnpicklingError(f"opcode {opcode.name} is not allowed")
            if opcode.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
                if opcode.name != "MEMOIZE" and argument > memo:
                    raise pickle.UnpicklingError("memo index out of order")
                memo += 1
            if opcode.name == "FRAME" and argument > len(data):
                raise pickle.UnpicklingError("frame longer than the record")
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # damaged pickles raise nearly anything
        reason = str(error).partition("\n")[0][:120]
        raise ValueError(
            f"{where}: not a safe pickle of int, bytes, str, list and tuple "
            f"({type(error).__name__}: {reason}); fetch or prepare this file again"
        ) from None
