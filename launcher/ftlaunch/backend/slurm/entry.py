"""The calls that SLURM jobs make. They stand alone, as who submits has no need of all that they lead to."""


def run_stage(folder: str) -> None:
    """Run the stage in a folder as the task of this node."""
    from ftlaunch.backend.slurm.node_task import run_stage

    run_stage(folder)


def run_probe(folder: str, interface: str | None) -> None:
    """Look at the node of this task for `ftlaunch doctor`."""
    from ftlaunch.backend.slurm.probe import look

    look(folder, interface)


def run_tool(folder: str, module: str) -> None:
    """Run one of the trainer's tools on the node of this task."""
    from ftlaunch.backend.slurm.tool_job import run_tool

    run_tool(folder, module)
