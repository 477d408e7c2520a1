"""A helper process of a rank: it takes orders line by line, and ends when its rank ends."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def keep_to(rank_pid: int) -> bool:
    """Have the kernel end this process when its rank ends; return False if the rank is gone already.

    Signals that a rank acts on are sent to its whole process group, so this process ignores them.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == rank_pid  # a rank that died before the call above would never have sent its signal
