"""Acts as the ranks of one node, without torch: `python worker.py NN-kind STEPS PACE FAULT --machine_rank R …`.

Like a trainer it meets its peers over the network at every step, agrees with them on leaving, goes on from its newest
checkpoint, and ends with a digest that tells whether every step was taken once and in order.
"""

import contextlib
import faulthandler
import hashlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

STEP = Path(sys.argv[1])
STEPS, PACE, FAULT = int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
OPTIONS = dict(zip(sys.argv[5::2], sys.argv[6::2], strict=True))
RANK = int(OPTIONS["--machine_rank"])
ATTEMPT = Path(os.environ["FTLAUNCH_ATTEMPT"])
NODES = json.loads((STEP / "step.json").read_text())["parallel"]["nodes"]
SAVE_EVERY = 10
asked: list[int] = []


def write(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.{RANK}")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def say(text: str) -> None:
    with (ATTEMPT / f"rank{RANK}.log").open("a") as file:
        print(text, file=file)


def meet() -> list[socket.socket]:
    """Connections to the peers: of the first node to all others, of these to the first."""
    if NODES == 1:
        return []
    address = (OPTIONS["--main_process_ip"], int(OPTIONS["--main_process_port"]))
    if RANK == 0:
        listener = socket.create_server(address)
        listener.settimeout(60)
        return [listener.accept()[0] for _ in range(NODES - 1)]
    while True:
        try:
            return [socket.create_connection(address, timeout=None)]
        except OSError:
            time.sleep(0.1)


def agree(peers: list[socket.socket], mine: bool) -> bool:
    """Whether any rank wants to leave, the same on all of them."""
    if RANK:
        peers[0].sendall(b"1" if mine else b"0")
        return receive(peers[0]) == b"1"
    wishes = [mine, *(receive(peer) == b"1" for peer in peers)]
    for peer in peers:
        peer.sendall(b"1" if any(wishes) else b"0")
    return any(wishes)


def receive(peer: socket.socket) -> bytes:
    peer.settimeout(None)
    if not (got := peer.recv(1)):
        raise ConnectionError("Connection closed by peer")
    return got


def newest() -> tuple[int, str]:
    """The step of the newest checkpoint and the digest until then."""
    manifests = sorted(STEP.glob("checkpoints/step-*/manifest.json"))
    if not manifests:
        return 0, ""
    content = json.loads(manifests[-1].read_text())
    return content["step"], content["digest"]


def save(step: int, digest: str) -> None:
    folder = STEP / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "manifest.json", {"step": step, "digest": digest})


def train() -> int:
    step, digest = newest()
    say(f"goes on after step {step}")
    peers = meet()
    while step < STEPS:
        step += 1
        (ATTEMPT / f"rank{RANK}.beat").touch()
        leaving = agree(peers, bool(asked) or (STEP / "stop").exists())
        time.sleep(PACE)
        fail_at(step)
        digest = hashlib.sha256(f"{digest}{step}".encode()).hexdigest()
        if RANK == 0:
            entry = {"step": step, "steps": STEPS, "loss": 1.0 / step, "time": time.time()}
            with (STEP / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")
            if leaving or step % SAVE_EVERY == 0:
                save(step, digest)
        if leaving and step < STEPS:
            if RANK == 0:
                write(ATTEMPT / "stopped.json", {"reason": "asked", "step": step})
            return 4
    if RANK == 0:
        write(STEP / "result.json", {"digest": digest})
    return 0


def fail_at(step: int) -> None:
    """FAULT is `KIND@STEP`, of the last rank; a trailing `!` lets it happen at every attempt, not only the first."""
    kind, _, place = FAULT.partition("@")
    again = place.endswith("!")
    if RANK != NODES - 1 or kind == "none" or step != int(place.rstrip("!")):
        return
    if ATTEMPT.name != "1" and not again:
        return
    say(f"{kind} at step {step}")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    raise {"memory": MemoryError("CUDA out of memory"), "error": RuntimeError("boom")}[kind]


def main() -> int:
    faulthandler.register(signal.SIGQUIT, (ATTEMPT / f"rank{RANK}.log").open("a"))
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(number))
    try:
        return train()
    except Exception as error:  # noqa: BLE001 whatever it is, it is reported
        say(repr(error))
        content = {"rank": RANK, "type": type(error).__name__, "message": str(error), "remedy": None}
        content |= {"traceback": repr(error), "log": str(ATTEMPT / f"rank{RANK}.log"), "user_error": False}
        temporary = ATTEMPT / f".error{RANK}"
        temporary.write_text(json.dumps(content))
        with contextlib.suppress(FileExistsError):
            os.link(temporary, ATTEMPT / "error.json")
        return 1


if __name__ == "__main__":
    sys.exit(main())
