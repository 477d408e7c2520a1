"""The call that a stage's job makes. It stands alone, as who submits has no need of all that it leads to."""


def run_stage(folder: str) -> None:
    """Run the stage in a folder as the task of this node."""
    from ftlaunch.backend.slurm.node_task import run_stage

    run_stage(folder)
