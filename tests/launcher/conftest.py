"""What all tests of the launcher share."""

import os

import pytest


@pytest.fixture(autouse=True)
def _no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here can tell whether files have reached the disk, and waiting for it takes seconds in all."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
