"""`ftlaunch push` and `ftlaunch export`: what is asked for, and what is refused."""

import sys
from pathlib import Path

import pytest

from ftlaunch import cli
from ftlaunch.cli import ship
from ftlaunch.errors import BAD_INPUT, DONE
from ftlaunch.processes import trainer
from ftlaunch.tools import PushOptions


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[PushOptions]:
    """What the trainer's tools are called with."""
    calls: list[PushOptions] = []

    def call(options: PushOptions) -> int:
        calls.append(options)
        return DONE

    monkeypatch.setattr(trainer, "call", call)
    return calls


def ends(monkeypatch: pytest.MonkeyPatch, *line: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ftlaunch", *line])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_nothing_is_sent_without_being_asked(
    model: Path, asked: list[PushOptions], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(monkeypatch, "push", str(model), "me/model") == BAD_INPUT
    assert asked == [PushOptions(folder=str(model), repository="me/model", dry_run=True)]
    assert "add --yes" in capsys.readouterr().err


def test_with_yes_it_is_sent(model: Path, asked: list[PushOptions], monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends(monkeypatch, "push", str(model), "me/model", "--yes", "--public") == DONE
    assert asked == [PushOptions(folder=str(model), repository="me/model", public=True)]


@pytest.mark.parametrize("more", [[], ["--yes"]])
def test_a_dry_run_sends_nothing_even_with_yes(
    model: Path, asked: list[PushOptions], monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    assert ends(monkeypatch, "push", str(model), "me/model", "--dry-run", *more) == DONE
    assert asked == [PushOptions(folder=str(model), repository="me/model", dry_run=True)]


def test_without_llama_cpp_the_command_is_told(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    assert ends(monkeypatch, "export", str(model), "out.gguf", "--outtype", "f16") == BAD_INPUT
    told = f"python llama.cpp/convert_hf_to_gguf.py {model} --outfile out.gguf --outtype f16"
    assert told in capsys.readouterr().err


def test_llama_cpps_converter_is_called_where_it_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ship.CONVERTER).write_text("import sys; open(sys.argv[3], 'w').write(' '.join(sys.argv[1:]))")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    out = tmp_path / "out.gguf"
    assert ends(monkeypatch, "export", str(model), str(out)) == DONE
    assert out.read_text() == f"{model} --outfile {out} --outtype auto"
    assert ends(monkeypatch, "export", str(model), str(out)) == BAD_INPUT


def test_an_adapter_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ends(monkeypatch, "export", str(tmp_path), "out.gguf") == BAD_INPUT
