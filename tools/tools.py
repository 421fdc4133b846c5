"""Imported in place of the package where a command is started by its path; says how to start it instead."""

import sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
command = Path(sys.argv[0]).resolve().relative_to(root).with_suffix("").parts[1]
print(f"error: start it from the folder {root} as python -m tools.{command}, not by its path", file=sys.stderr)
sys.exit(2)
