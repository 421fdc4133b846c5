"""The commands, each started as ``python -m tools.NAME``, and what they share with the training scripts."""

import os
import signal
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that wait soon leave their core to others; read by torch

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    # a command is being started: Ctrl-C just ends it while it imports; tools.console takes over from there
    signal.signal(signal.SIGINT, signal.SIG_DFL)
