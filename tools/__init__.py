"""The commands, each started as ``python -m tools.NAME``, and what they share with the training scripts."""

import signal
import sys

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    # a command is being started: Ctrl-C just ends it while it imports; tools.console takes over from there
    signal.signal(signal.SIGINT, signal.SIG_DFL)
