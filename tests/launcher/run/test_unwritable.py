"""What can be said of a folder that nothing can be written into."""

import os
from pathlib import Path

from ftlaunch.run.files import why_unwritable

NOBODY = 65534
"""A user id that owns nothing here."""


def test_what_a_reader_may_not_write_is_no_broken_disk(tmp_path: Path) -> None:
    assert why_unwritable(tmp_path / "gone") == "No such file or directory"
    assert why_unwritable(tmp_path) is None
    tmp_path.chmod(0o555)
    me = os.geteuid()
    try:
        if me == 0:  # whom no permission stops
            os.seteuid(NOBODY)
        assert why_unwritable(tmp_path) is None
    finally:
        os.seteuid(me)
        tmp_path.chmod(0o755)
