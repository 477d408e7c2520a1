"""The vocabulary of a site profile: how a SLURM cluster wants to be asked. Recipes hold none of this.

As in recipe.py, the string below a field is its documentation and a key that is not here is an error.
"""

from typing import Annotated

from msgspec import Meta, Struct, field

from ftlaunch.bounds import Name, NonNegative, Positive

Line = Annotated[str, Meta(min_length=1, max_length=1024)]
TimeLimit = Annotated[str, Meta(pattern=r"^(\d+-)?\d{1,3}:\d{2}:\d{2}$")]
Memory = Annotated[str, Meta(pattern=r"^\d+[KMGT]$")]
Variable = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Flag = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]*$")]
GpuRequest = Annotated[str, Meta(pattern=r"^(none|gpus-per-node|gres)(:[A-Za-z0-9._-]+)?$")]


class Resources(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    """Memory on each node, such as "64G"."""
    time_limit: TimeLimit | None = None
    """Of one start, as [days-]hours:minutes:seconds. A run that needs longer is restarted from its checkpoint."""


class Cluster(Resources, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A SLURM cluster."""

    time_limit: TimeLimit = "4:00:00"
    """Of one start, as [days-]hours:minutes:seconds. A run that needs longer is restarted from its checkpoint."""
    stage: dict[Name, Resources] = field(default_factory=dict[Name, Resources])
    """[stage.KIND] tables: what stages of one kind are given instead, as `[stage.merge] partition = "cpu"`."""
    gpus: GpuRequest = "gpus-per-node"
    """How GPUs are asked for, one a process: "gpus-per-node", "gres", either with a type as in "gres:a100", or "none".
    A stage with device = "cpu" asks for none, nor does a merge."""
    signal_lead: Annotated[int, Meta(ge=10)] = 120
    """Seconds ahead of the time limit at which all ranks are asked to save: longer than one step and one save."""
    hang_after: Annotated[int, Meta(ge=5)] = 600
    """Seconds without an optimizer step after which a stage is ended and started again; longer where an evaluation or a
    save has taken longer, and three times as long ahead of the first step."""
    max_restarts: NonNegative = 50
    """Restarts of one job, whatever their cause."""
    exclude: list[Line] = []
    """Nodes that are never used."""
    interface: Line | None = None
    """Network interface between nodes, such as "ib0". None: the one that leads to the other nodes."""
    offline: bool = False
    """Compute nodes reach no hub: models and data sets are taken from the cache only."""
    setup: list[Line] = []
    """Lines of bash run on the first node ahead of srun. The shell is no login shell: where `module` is wanted,
    begin with "source /etc/profile"."""
    environment: dict[Variable, Line] = field(default_factory=dict[Variable, Line])
    """Variables for the stages' processes. They travel in a file that only its owner can read."""
    sbatch: dict[Flag, Line | int | bool] = field(default_factory=dict[Flag, Line | int | bool])
    """Any further flags of sbatch, such as `reservation = "course"`. true stands for a flag without a value."""
    srun: list[Line] = []
    """Further arguments of srun."""
    slurm_conf: Line | None = None
    """The cluster's slurm.conf, where it is not the one that SLURM's commands find by themselves."""

    def resources(self, kind: str) -> Resources:
        """What stages of a kind are given: their own table where it says something, else the profile's top."""
        own = self.stage.get(kind, Resources())
        values = {name: getattr(own, name) or getattr(self, name) for name in Resources.__struct_fields__}
        return Resources(**values)


def seconds(limit: str) -> int:
    """Of a time limit."""
    days, _, clock = limit.rpartition("-")
    hours, minutes, rest = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest
