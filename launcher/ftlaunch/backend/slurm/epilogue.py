"""What a batch script does last: `python -m ftlaunch.backend.slurm.epilogue FOLDER CODE`, where its tasks have failed.

As a rule they have said how, and seen to the job themselves. Where srun has killed them, as it does when it loses a
node for a while that SLURM itself does not give up, or a signal has come before they could listen, nobody has: then
this puts the job back into the queue.
"""

import sys
from pathlib import Path

from ftlaunch.backend.slurm.stage_job import finish_killed_job
from ftlaunch.run.layout import StageDir

if __name__ == "__main__":
    finish_killed_job(StageDir(Path(sys.argv[1])), int(sys.argv[2]))
