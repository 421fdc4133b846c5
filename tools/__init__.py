"""The commands, each started as ``python -m tools.NAME``, and what they share with the training scripts.

Commands and scripts import this before torch and all else that takes long.
"""

import os
import signal
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that wait soon leave their core to others; read by torch

starting = ("-m", "train_vm.py", "train_vm_fast.py", "train_vlm.py")  # as against a notebook or a script of a user's
if os.path.basename(sys.argv[0]) in starting and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    # a command is being started: Ctrl-C just ends it while it imports; tools.console takes over from there
    signal.signal(signal.SIGINT, signal.SIG_DFL)
