"""Imported in place of the package where a command is started by its path; says how to start it instead."""

import sys
from pathlib import Path

path = Path(sys.argv[0]).resolve()
print(
    f"error: start it from the folder {path.parents[1]} as python -m tools.{path.stem}, not by its path",
    file=sys.stderr,
)
sys.exit(2)
