"""No secret gets past: as it is, encoded, in pieces, or by its shape; and what is no secret stays."""

import base64
import io
import json
from pathlib import Path
from urllib.parse import quote

import pytest

from ftlaunch.safety.redact import HIDDEN, RedactedStream, has_secret, redact, redact_file

CANARY = "can+ary/Zq 8=x7'\"7Wv3é"
"""Characters that URLs, JSON, Python and base64 each write in their own way."""

SHAPED = [
    "hf_" + "Abcd1234" * 4,
    "sk-proj-" + "Abcd1234" * 4,
    "ghp_" + "Abcd1234" * 4,
    "github_pat_" + "Abcd1234" * 4,
    "wandb_v1_" + "Abcd1234" * 4,
    "AKIA" + "ABCD1234" * 2,
    "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSMeKKF2QT4",
]


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", CANARY)


def encodings(text: str) -> dict[str, str]:
    raw = text.encode()
    return {
        "as it is": text,
        "in JSON": json.dumps({"header": text}),
        "by repr": repr({"header": text}),
        "in a URL": f"https://host/?key={quote(text, safe='')}&x=1",
        "in a path": f"https://host/{quote(text)}/x",
        "in base64": base64.b64encode(raw).decode(),
        "in base64 after one byte": base64.b64encode(b":" + raw).decode(),
        "in base64 after two bytes, with more after it": base64.b64encode(b"u:" + raw + b" and more").decode(),
        "in base64 for URLs": base64.urlsafe_b64encode(b"user:" + raw).decode(),
    }


@pytest.mark.parametrize("how", encodings(""))
def test_a_secret_of_the_environment_is_hidden(how: str):
    text = f"before {encodings(CANARY)[how]} after"
    clean = redact(text)
    assert clean.startswith("before ")
    assert clean.endswith(" after")
    assert HIDDEN in clean
    assert not has_secret(clean)
    for piece in encodings(CANARY).values():
        assert piece not in clean


@pytest.mark.parametrize("token", SHAPED)
def test_a_token_is_known_by_its_shape(token: str):
    assert redact(f"Authorization: {token}, that was all") == f"Authorization: {HIDDEN}, that was all"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("git clone https://me:hunter2@host/x", f"git clone https://{HIDDEN}@host/x"),
        ("curl -H 'Authorization: Bearer abcdefgh12'", f"curl -H 'Authorization: Bearer {HIDDEN}'"),
        ("export WANDB_API_KEY=0123456789abcdef", f"export WANDB_API_KEY={HIDDEN}"),
        (
            "environ({'DB_PASSWORD': 'correct horse', 'A': 'b'})",
            f"environ({{'DB_PASSWORD': {HIDDEN}, 'A': 'b'}})",
        ),
    ],
)
def test_a_secret_is_known_by_what_stands_around_it(text: str, clean: str):
    assert redact(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "eos_token: <|im_end|>, pad_token='<|im_end|>', tokens=123456789",
        "epoch 1  tokens_per_second 1234.5678  loss 0.123456789",
        "1f4e03d0c0ffee00c0ffee00c0ffee00c0ffee00",  # a commit
        "/home/me/hf_cache/models--sk-learn--tiny and task_keys=abcdefghij",
        "KeyError: 'MAX_TOKENS=4096'",
        "https://host:8080/a@b",
    ],
)
def test_what_is_no_secret_stays(text: str):
    assert redact(text) == text


def test_variables_that_only_sound_secret_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "sometimes")
    monkeypatch.setenv("HF_TOKEN_PATH", "somewhere")
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    monkeypatch.setenv("SHORT_TOKEN", "step")
    assert redact(f"step sometimes somewhere {tmp_path}") == f"step sometimes somewhere {tmp_path}"


def test_a_stream_sees_a_secret_that_is_written_in_pieces():
    sink = io.StringIO()
    stream = RedactedStream(sink)
    for piece in (CANARY[:5], CANARY[5:], " one\ntw", "o\r"):
        stream.write(piece)
    assert sink.getvalue() == f"{HIDDEN} one\ntwo\r"
    stream.writelines([CANARY, "!"])
    stream.flush()
    assert sink.getvalue() == f"{HIDDEN} one\ntwo\r{HIDDEN}!"
    assert stream.isatty() is False


def test_a_file_is_cleaned_in_place_and_a_clean_one_untouched(tmp_path: Path):
    dirty, clean = tmp_path / "dirty.log", tmp_path / "clean.log"
    dirty.write_bytes(f"one\r\n{CANARY}\nthree".encode() + b"\xff\n")
    dirty.chmod(0o600)
    clean.write_text("nothing\n")
    before = clean.stat().st_mtime_ns
    for path in (dirty, clean):
        redact_file(path)
    assert dirty.read_bytes() == f"one\r\n{HIDDEN}\nthree".encode() + b"\xff\n"
    assert dirty.stat().st_mode & 0o777 == 0o600
    assert (clean.stat().st_mtime_ns, dirty.stat().st_size) == (before, len(dirty.read_bytes()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean.log", "dirty.log"]
