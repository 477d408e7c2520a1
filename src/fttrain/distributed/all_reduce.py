"""A small all-reduce between nodes, for `ftlaunch doctor`, with torch's variables set.

Started as `python -m fttrain.distributed.all_reduce`.

Prints JSON: backend, NCCL's version where it is used, and seconds for a sum of a million floats.
"""

import datetime
import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.cuda import nccl

WAIT = datetime.timedelta(seconds=60)
NUMBERS, ROUNDS = 1_000_000, 3


def main() -> None:
    """Sum ones over all ranks, over NCCL where every node has GPUs; leaves with a message where that goes wrong."""
    backend = "nccl" if os.environ.get("FTLAUNCH_REDUCE_GPU") == "1" else "gloo"
    dist.init_process_group(backend, timeout=WAIT)
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    ranks = dist.get_world_size()
    for _ in range(ROUNDS):  # the first one also makes the connections
        numbers = torch.ones(NUMBERS, device=device)
        began = time.perf_counter()
        dist.all_reduce(numbers)
        wrong = int((numbers != ranks).sum())  # waits for a GPU, too
        took = time.perf_counter() - began
    dist.destroy_process_group()
    if wrong:
        sys.exit(f"{wrong} of {NUMBERS} sums are wrong")
    version = ".".join(map(str, nccl.version())) if backend == "nccl" else None
    print(json.dumps({"backend": backend, "nccl": version, "seconds": took}))


if __name__ == "__main__":
    main()
