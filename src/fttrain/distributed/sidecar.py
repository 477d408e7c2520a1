"""A process beside a rank that works for it: told what to do line by line, and ended with it."""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1


def keep_to(rank_pid: int) -> bool:
    """Have this process end with its rank, whatever ends that; False where the rank has gone already.

    Signals that a rank acts on come to its whole process group; here they are not heard.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == rank_pid
