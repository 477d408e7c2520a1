"""The vocabulary of a site profile: how a SLURM cluster wants to be asked. Recipes hold none of this.

As in recipe.py, the string below a field is its documentation and a key that is not here is an error.
"""

from typing import Annotated, Literal

from msgspec import Meta, field

from ftlaunch.recipe.types import Name, NonNegative, Positive, Table

Line = Annotated[str, Meta(min_length=1, max_length=1024)]
TimeLimit = Annotated[
    str,
    Meta(
        # "90" (minutes), "90:30", "4:00:00", "2-12" (days-hours), "2-12:30:00".
        pattern=r"^(\d+-\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2})$",
        description='a time as in "4:00:00" (hours, minutes, seconds) or "2-12:00:00" (with days)',
    ),
]
Memory = Annotated[str, Meta(pattern=r"^\d+[KMGT]?$", description='an amount of memory as in "64G"')]
Variable = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="the name of a variable")]
Flag = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]*$", description="a flag without its dashes")]
ContainerImage = Annotated[
    str,
    Meta(
        pattern=r"^(none|(apptainer|pyxis):[^\s].*)$",
        max_length=1024,
        description='"none", "apptainer:IMAGE" or "pyxis:IMAGE"',
    ),
]
Mount = Annotated[
    str, Meta(pattern=r"^/[^:,]*(:/[^:,]*)?$", max_length=1024, description='a folder as in "/data" or "/data:/inside"')
]
GpuRequest = Annotated[
    str,
    Meta(
        pattern=r"^(none|gpus-per-node|gres)(:[A-Za-z0-9._-]+)?$",
        description='"none", "gpus-per-node", "gres" or, with a type, "gres:a100"',
    ),
]


class Resources(Table, frozen=True, kw_only=True):
    """What a stage's job is given. None leaves it to the cluster's own default."""

    partition: Line | None = None
    """sbatch --partition."""
    account: Line | None = None
    """sbatch --account."""
    qos: Line | None = None
    """sbatch --qos."""
    constraint: Line | None = None
    """sbatch --constraint: features that the nodes must have."""
    cpus_per_node: Positive | None = None
    """CPUs on each node, for all of its processes together."""
    memory_per_node: Memory | None = None
    """Memory on each node, such as "64G"; "0" is all that it has."""
    time_limit: TimeLimit | None = None
    """Limit of one start, as [days-]hours:minutes:seconds. A run that needs longer is restarted from its checkpoint."""


class Cluster(Resources, frozen=True, kw_only=True):
    """A SLURM cluster."""

    time_limit: TimeLimit = "4:00:00"
    """Limit of one start, as [days-]hours:minutes:seconds. A run that needs longer is restarted from its checkpoint."""
    stage: dict[Name, Resources] = field(default_factory=dict[Name, Resources])
    """[stage.KIND] tables: what stages of one kind are given instead, as `[stage.merge] partition = "cpu"`."""
    gpus: GpuRequest = "gpus-per-node"
    """How GPUs are asked for, one a process: "gpus-per-node", "gres", either with a type as in "gres:a100", or "none".
    A stage with device = "cpu" asks for none, nor does a merge."""
    signal_lead: Annotated[int, Meta(ge=10)] = 120
    """Seconds before the time limit at which all ranks are asked to save: longer than one step and one save."""
    hang_after: Annotated[int, Meta(ge=5)] = 600
    """Seconds without an optimizer step after which a stage is ended and started again; longer where an evaluation or a
    save has taken longer, and three times as long (but at least five minutes) before the first step."""
    max_restarts: NonNegative = 50
    """Restarts of one stage, whatever their cause."""
    restart: Literal["requeue", "successor"] = "requeue"
    """How a stage is started again: its own job goes back into the queue, or, where compute nodes have no `scontrol`,
    jobs that were submitted with it wait for its end (afternotok) and take over, one after the other."""
    successors: Positive = 3
    """Jobs that wait to follow each stage's own where restart = "successor": no stage starts again more often."""
    exclude: list[Line] = field(default_factory=list[Line])
    """Nodes that are never used."""
    interface: Line | None = None
    """Network interface between nodes, such as "ib0". None: the one that leads to the other nodes."""
    offline: bool = False
    """Compute nodes reach no hub: models and data sets are taken from the cache only."""
    container: ContainerImage = "none"
    """What the tasks run in: "apptainer:IMAGE", "pyxis:IMAGE" (Pyxis with enroot) or "none". The run's folder is seen
    inside; the image holds Python with ftlaunch's dependencies, and no `scontrol` as a rule: see `restart`."""
    mounts: list[Mount] = field(default_factory=list[Mount])
    """Further folders that the container sees, as HOST or HOST:INSIDE."""
    python: Line | None = None
    """Python on the nodes, or in the container. None: at the path of the one that submits."""
    mail: Line | None = None
    """Address that SLURM writes to when a stage fails or the run is done (sbatch --mail-user)."""
    notify: Line | None = None
    """Line of bash run on the first node when the run is done, has failed or was stopped as asked. It finds the run's
    folder, the stage, the state and the reason in FTLAUNCH_RUN, FTLAUNCH_STAGE, FTLAUNCH_STATE and FTLAUNCH_REASON."""
    setup: list[Line] = field(default_factory=list[Line])
    """Lines of bash run on the first node before srun. The shell is no login shell: where `module` is wanted,
    begin with "source /etc/profile"."""
    environment: dict[Variable, Line] = field(default_factory=dict[Variable, Line])
    """Variables for the stages' processes. They travel in a file that only its owner can read."""
    sbatch: dict[Flag, Line | int | bool] = field(default_factory=dict[Flag, Line | int | bool])
    """Any further flags of sbatch, such as `reservation = "course"`. true stands for a flag without a value."""
    srun: list[Line] = field(default_factory=list[Line])
    """Further arguments of srun."""
    slurm_conf: Line | None = None
    """The cluster's slurm.conf, where it is not the one that SLURM's commands find by themselves."""

    @property
    def most_restarts(self) -> int:
        """How often one stage may be started again."""
        return self.max_restarts if self.restart == "requeue" else min(self.max_restarts, self.successors)

    def resources(self, kind: str) -> Resources:
        """What stages of a kind are given: their own table where it says something, else the profile's top."""
        own = self.stage.get(kind, Resources())
        values = {name: getattr(own, name) or getattr(self, name) for name in Resources.__struct_fields__}
        return Resources(**values)


def seconds(limit: str) -> int:
    """Return the seconds of a time limit in any of SLURM's forms: minutes, minutes:seconds, days-hours, …."""
    days, dash, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if not dash and len(parts) < 3:
        parts.insert(0, 0)  # "90" is minutes, and "90:30" minutes and seconds
    hours, minutes, rest = (*parts, 0, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest
