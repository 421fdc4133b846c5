"""How every command speaks to its user: errors and warnings in one line."""

import sys
from contextlib import contextmanager


@contextmanager
def user_errors():
    """Turn errors that a user can mend into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
