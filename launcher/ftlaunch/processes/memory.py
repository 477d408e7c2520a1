"""Whether the kernel has killed processes for lack of memory, by its own count for the control group of this one."""

import re
from pathlib import Path

GROUPS = re.compile(r"^\d+:(|memory):(/.*)$", re.MULTILINE)
"""The line of /proc/self/cgroup with the group that counts memory: no controller is named in version 2 of groups."""
KILLS = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def kills(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Processes that have been killed so far in this process's group and below; 0 where the kernel does not tell."""
    try:
        # SLURM gives each task a group of its own, which its ranks share, so another job's kills are not counted.
        for controller, path in GROUPS.findall((proc / "self/cgroup").read_text()):
            file = groups / controller / path[1:] / ("memory.oom_control" if controller else "memory.events")
            if file.exists() and (found := KILLS.search(file.read_text())):
                return int(found[1])
    except OSError:
        pass
    return 0
