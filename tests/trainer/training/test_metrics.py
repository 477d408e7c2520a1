"""metrics.jsonl on resume: each step once, whatever a crash left, and no more is read than goes."""

import io
import json
from pathlib import Path

import pytest

from ftlaunch.run.files import lines_from_end
from fttrain.training.metrics import MetricsLog


def line(step: int, **values: object) -> str:
    return json.dumps({"step": step, **values}) + "\n"


WHOLE = [line(1, loss=1.0), line(2, loss=0.5), line(2, **{"eval/loss": 0.4}), line(3, loss=float("nan"))]


@pytest.mark.parametrize("last_step", range(5))
@pytest.mark.parametrize("torn", ["", '{"step": 4, "lo', "\n", '{"step": 4, "lo\n', "[]\n"])
def test_lines_up_to_the_checkpoint_are_kept(last_step: int, torn: str, tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(WHOLE) + torn)
    log = MetricsLog(path, is_main=True, last_step=last_step)
    kept = WHOLE[: (0, 1, 3, 4, 4)[last_step]]
    assert path.read_text() == "".join(kept)
    log.write(last_step + 1, {"loss": 0.1})
    assert path.read_text().startswith("".join(kept) + f'{{"step": {last_step + 1}, ')


def test_other_ranks_leave_the_file_alone(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(WHOLE))
    MetricsLog(path, is_main=False, last_step=0)
    assert path.read_text() == "".join(WHOLE)


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
@pytest.mark.parametrize("text", [b"", b"\n", b"one", b"one\n", b"one\ntwo", b"\n\nthree\nfour\n"])
def test_lines_come_from_the_end_with_where_they_end(text: bytes, block: int):
    found = list(lines_from_end(io.BytesIO(text), block))
    assert [piece for _, piece in reversed(found)] == text.split(b"\n")
    assert all(text[end - len(piece) : end] == piece for end, piece in found)


class Counted(io.BytesIO):
    """A file that counts what is read of it."""

    taken = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.taken += len(data)
        return data


def test_a_long_file_is_read_only_as_far_as_it_is_cut():
    file = Counted("".join(line(step, loss=1.0) for step in range(100_000)).encode())
    end = next(end for end, text in lines_from_end(file) if text and json.loads(text)["step"] <= 99_990)
    assert file.getvalue()[: end + 1].endswith(line(99_990, loss=1.0).encode())
    assert file.taken <= 2 * (1 << 16)
