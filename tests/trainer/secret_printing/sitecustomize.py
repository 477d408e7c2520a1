"""On PYTHONPATH, it makes every Python process leak its secrets as libraries do, and note what is unpickled.

At the start each process prints its environment. When a rank opens a model's weights it prints secrets again, past
Python's own streams too; told to (PRINTING_FAILS), it then fails with all of the environment in its error.
"""

import base64
import os
import sys
import traceback
from urllib.parse import quote

TRAINER = "fttrain" in sys.orig_argv  # a rank, or what launches it


def leak() -> None:
    print(f"environment: {dict(os.environ)}")
    for name, value in os.environ.items():
        print(f"{name} is {value}; {quote(value, safe='')}; {base64.b64encode(b'user:' + os.fsencode(value)).decode()}")
    sys.stdout.flush()
    os.write(2, f"from C++: {os.environ['HF_TOKEN']} {os.environ['LAB_SECRET']}\n".encode())


def hear(event: str, arguments: tuple) -> None:
    if event == "pickle.find_class":
        frames = "".join(traceback.format_stack())
        with open(os.environ["PRINTING_NOTES"], "a") as file:  # noqa: PTH123 nothing may be imported here
            file.write(f"{arguments}\n{frames}\n")
    elif event == "open" and str(arguments[0]).endswith("tokenizer.json") and TRAINER and not heard:
        heard.append(event)
        leak()
        if "PRINTING_FAILS" in os.environ:
            raise RuntimeError(f"cannot sign in with {dict(os.environ)}")


heard: list[str] = []
if "HF_TOKEN" in os.environ:
    if TRAINER:
        leak()
    sys.addaudithook(hear)
