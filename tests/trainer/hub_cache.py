"""A data set of the hub as `datasets` keeps it, so that it is had without a network."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

OLD, NEW = "1" * 40, "2" * 40
"""Commits."""


def forget_opened() -> None:
    """What an earlier test has opened under the same name is not taken for this one's."""
    from fttrain.data import sources

    sources._builder.cache_clear()
    sources._open.cache_clear()


def without_network(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """The hub is not reached, and `datasets` keeps its copies in `cache`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    forget_opened()


def keep(cache: Path, commit: str, rows: list[dict[str, Any]]) -> None:
    """Put owner/rows at a commit into the cache, as if it had just been fetched."""
    from datasets import load_dataset

    written = cache / f"of-{commit}"
    written.mkdir(parents=True)
    (written / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made: Any = load_dataset(
        "json", data_files={"train": str(written / "train.jsonl")}, split="train", cache_dir=str(written)
    )
    (file,) = (Path(one["filename"]) for one in made.cache_files)
    copy = cache / "owner___rows/default/0.0.0" / commit
    shutil.copytree(file.parent, copy)
    (copy / file.name).rename(copy / "rows-train.arrow")
    info = json.loads((copy / "dataset_info.json").read_text())
    info |= {"config_name": "default", "dataset_name": "rows"}
    (copy / "dataset_info.json").write_text(json.dumps(info))
