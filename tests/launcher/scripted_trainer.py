"""Acts as a step's processes, without torch: `python scripted_trainer.py NN-kind ACT`, in the run folder."""

import json
import os
import signal
import sys
import time
from pathlib import Path

STEP = Path(sys.argv[1])
ATTEMPT = Path(os.environ["FTLAUNCH_ATTEMPT"])
ELASTIC = """\
E1122 torch/distributed/elastic/multiprocessing/api.py:1003] failed (exitcode: -9) local_rank: 1 (pid: 402) of binary
========================================================
fttrain FAILED
--------------------------------------------------------
Failures:
[0]:
  time      : 2025-11-22_01:02:03
  host      : h
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 401)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 401
--------------------------------------------------------
Root Cause (first observed failure):
[1]:
  time      : 2025-11-22_01:02:02
  host      : h
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 402)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 402
========================================================
"""


def log(rank: int, text: str) -> None:
    with (ATTEMPT / f"rank{rank}.log").open("a") as file:
        file.write(text)


def measure(step: int, steps: int) -> None:
    entry = {"step": step, "steps": steps, "loss": 2.0 / step, "tokens_per_second": 1234.0, "time": time.time()}
    with (STEP / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(entry) + "\n")


def write(path: Path, value: object) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def error(rank: int, kind: str, message: str, **more: object) -> None:
    content = {"rank": rank, "type": kind, "message": message, "remedy": None, "user_error": False}
    content |= {"traceback": "Traceback\n  File x\nboom", "log": str(ATTEMPT / f"rank{rank}.log")}
    write(ATTEMPT / "error.json", content | more)


def stay(**how: object) -> None:
    """A process like an elastic worker: in a session of its own, deaf to SIGTERM, never ending by itself."""
    import subprocess  # dear, and most acts go without

    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-S", "-c", code], start_new_session=True, **how)
    (STEP / "child").write_text(str(child.pid))


def train() -> None:
    for step in (1, 2, 3):
        measure(step, 3)
        log(0, f"step {step}\n")
    log(1, "hello from 1\nno line end")
    print("launched")
    write(STEP / "result.json", {})


def hang() -> None:
    """Two ranks, the second of which is stopped, and a launching process that waits for them."""
    import subprocess

    for rank in "01":
        env = {**os.environ, "RANK": rank}
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], env=env)
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGSTOP)
    child.wait()


def train_until_stopped() -> None:
    step = 0
    while not (STEP / "stop").exists():
        step += 1
        measure(step, 1000)
        time.sleep(0.02)
    write(ATTEMPT / "stopped.json", {"reason": "stop file", "step": step})
    sys.exit(4)


def take_long_to_stop() -> None:
    measure(1, 1000)
    while not (STEP / "stop").exists():
        time.sleep(0.02)
    time.sleep(0.1)
    write(ATTEMPT / "stopped.json", {"reason": "stop file", "step": 1})
    sys.exit(4)


def finish_when_stopped() -> None:
    while not (STEP / "stop").exists():
        time.sleep(0.02)
    train()


def never_leave() -> None:
    stay()
    (STEP / "ready").touch()
    time.sleep(60)


def leave_a_worker() -> None:
    stay()
    train()


def fail() -> None:
    error(1, "RuntimeError", "boom")
    sys.exit(1)


def fail_by_user() -> None:
    error(0, "UserError", "no rows are left", remedy="raise max_length", user_error=True)
    sys.exit(2)


def fail_beside_a_deaf_peer() -> None:
    stay()
    error(1, "RuntimeError", "boom")
    while Path(f"/proc/{(STEP / 'child').read_text()}/environ").exists() and _is_alive():
        time.sleep(0.02)
    sys.exit(1)


def _is_alive() -> bool:
    return " Z " not in Path(f"/proc/{(STEP / 'child').read_text()}/stat").read_text()


def lose_a_rank() -> None:
    print(ELASTIC)
    sys.exit(1)


def echo_a_lost_rank() -> None:
    error(1, "PeerDied", "rank 1 died without a word")
    lose_a_rank()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def use_up_memory() -> None:
    """As accelerate does with a single rank: a child that asks for more than its control group has."""
    child = os.fork()
    if child == 0:
        bytearray(1 << 29)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(f"Command died with <Signals.SIGKILL: {os.WTERMSIG(status)}>.")
    sys.exit(1)


ACCELERATE = """\
ImportError: no module
Traceback (most recent call last):
  File "/v/bin/accelerate", line 6, in <module>
    sys.exit(main())
subprocess.CalledProcessError: Command '['python', '-m', 'fttrain', '01-sft']' returned non-zero exit status 1.
"""


def fail_to_import() -> None:
    print(ACCELERATE)
    sys.exit(1)


def break_down() -> None:
    print("ValueError: accelerate does not like this")
    sys.exit(1)


if __name__ == "__main__":
    globals()[sys.argv[2]]()
