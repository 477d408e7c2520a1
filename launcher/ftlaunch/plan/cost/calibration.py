"""How fast this machine was measured to be, kept from one plan to the next."""

import platform
import time
from pathlib import Path

import msgspec
from msgspec import Struct

from ftlaunch.run.files import cache_folder, read_if_sound, write_json


class Measured(Struct, frozen=True):
    """What `fttrain.tools.calibrate` has found on one machine."""

    machine: str
    device: str
    operations_per_second: dict[str, float]
    """Speed of large matrix products of one process, by number format."""
    when: float = 0.0
    """Seconds since 1970."""


def place() -> Path:
    """~/.cache/ftlaunch/calibration/HOST.json, unless XDG_CACHE_HOME says otherwise."""
    return cache_folder("calibration") / f"{platform.node() or 'here'}.json"


def read() -> Measured | None:
    """What was measured on this machine; None where nothing was, or where it cannot be read."""
    return read_if_sound(place(), Measured)


def keep(said: bytes) -> Measured:
    """Keep what the tool has said. Raises DecodeError where that is no measurement."""
    measured = msgspec.structs.replace(msgspec.json.decode(said, type=Measured), when=time.time())
    place().parent.mkdir(parents=True, exist_ok=True)
    write_json(place(), measured)
    return measured
