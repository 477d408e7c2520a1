"""What SLURM's words for why a job waits, or has ended, mean to whoever wants it to run."""

import re

NEVER = (
    (r"PartitionTimeLimit", "its time_limit is beyond that of the partition"),
    (r"PartitionNodeLimit", "the partition has fewer nodes than it asks for, or they are down"),
    (r"PartitionConfig", "no nodes of the partition are what it asks for"),
    (r"PartitionDown|PartitionInactive", "the partition takes no jobs"),
    (r"BadConstraints", "no node is what it asks for: constraint, CPUs, memory or GPUs"),
    (
        r"AccountingPolicy|AccountNotAllowed|QOSNotAllowed|InvalidAccount|InvalidQOS",
        "account or qos may not be used so",
    ),
    # SLURM appends the nodes, "ReqNodeNotAvail, UnavailableNodes:n[1-2]", or that they are "Reserved for maintenance".
    (
        r"ReqNodeNotAvail(?!.*maintenance).*|Nodes required for job are DOWN.*",
        "nodes that it asks for are down, drained or reserved",
    ),
    (
        r"launch failed requeued held",
        "its nodes could not start it (sinfo -R tells why), and it is held back: scontrol release",
    ),
    (
        r"job requeued in held state|SpecialExit|SPECIAL_EXIT|REQUEUE_HOLD",
        "somebody put it back and holds it: scontrol release",
    ),
    (r"ReservationDeleted|RESV_DEL_HOLD", "its reservation is no more"),
    (r"JobHeldUser", "somebody holds it back: scontrol release"),
    (r"JobHeldAdmin", "an administrator holds it back, and has to release it (scontrol release)"),
    (r"DependencyNeverSatisfied", "a job that it waits for has failed"),
    (
        r"(Assoc|QOS)M(ax|in)\w*PerJob\w*|QOSMax\w*PerNode|(Assoc|QOS)MaxWallDurationPerJobLimit",
        "it asks for more than one job is allowed",
    ),
)
"""Reasons for which a job waits for ever, unless somebody changes something."""
PERHAPS = (
    (
        r"ReqNodeNotAvail.*maintenance",
        "maintenance is near or under way; a time_limit that ends before it would let the job start earlier",
    ),
    (
        r"(Assoc|QOS)\w*",
        "a limit of the account or qos; it starts when others leave room, if it asks for no more than that",
    ),
)
ENDED = {
    "JobLaunchFailure": "its batch script could not be started (is the run's folder there, at this path, on the nodes?)"
    " or was killed by a signal",
    "Dependency": "it waited for another job, which has not succeeded unless somebody cancelled this one",
    "DependencyNeverSatisfied": "the job that it waited for has not succeeded",
    "TIMEOUT": "its time limit ran out",
    "OUT_OF_MEMORY": "it was given too little memory: see memory_per_node",
    "NODE_FAIL": "a node has died, and it was not put back into the queue",
    "BOOT_FAIL": "its nodes did not start",
    "DEADLINE": "its deadline has passed",
    "PREEMPTED": "a more urgent job took its nodes, and it was not put back into the queue",
}


def why_waiting(reason: str | None) -> str:
    """Return why a job waits, in a few words, SLURM's own among them."""
    if reason is None:
        return "waits in the queue"
    # NEVER goes first: the pattern in PERHAPS matches its QOSMaxWallDurationPerJobLimit as well.
    if (told := _meaning(NEVER, reason)) is not None:
        return f"will not start as it is: {reason}: {told}"
    told = _meaning(PERHAPS, reason)
    return f"waits in the queue: {reason}{f': {told}' if told else ''}"


def never_starts(reason: str | None) -> bool:
    """Return whether a job that waits for this reason will wait for ever."""
    return reason is not None and _meaning(NEVER, reason) is not None


def why_ended(state: str, reason: str | None) -> str:
    """Return why a job has ended without doing its work. A reason left over from its waiting says nothing."""
    words = [state]
    if reason in ENDED or reason in ("NonZeroExitCode", "RaisedSignal"):
        words = [f"{state} ({reason})"]
    told = ENDED.get(reason or "") or ENDED.get(state)
    return ": ".join([*words, *([told] if told else [])])


def _meaning(table: tuple[tuple[str, str], ...], reason: str) -> str | None:
    # Between the words of a reason scontrol writes "_", and squeue a blank.
    forms = (reason, reason.replace("_", " "))
    return next((told for pattern, told in table if any(re.fullmatch(pattern, form) for form in forms)), None)
