"""Sending a model's folder to a hub that a small server acts."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from ftlaunch.errors import UserError
from ftlaunch.tools import PushOptions
from fttrain.tools import push

TOKEN = "hf_" + "x" * 30


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload of small files asks for."""

    sent: dict[str, bytes]
    asked: list[tuple[str, Any]]
    refuses = False

    def do_GET(self) -> None:
        self._answer({"id": "me/model", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        type(self).asked.append((self.path, self.headers.get("Authorization")))
        if self.refuses:
            self._answer({"error": "You may not"}, 403)
        elif self.path.endswith("/repos/create"):
            self._answer({"url": f"http://{self.headers['Host']}/me/model", "name": "me/model", "id": "1"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            told = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            self._answer({"files": told})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    type(self).sent[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"commitUrl": f"http://{self.headers['Host']}/me/model/commit/1", "commitOid": "1" * 40})
        else:
            self._answer({})

    def _answer(self, told: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is said of requests."""


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"activations": [{"kind": "saturated", "sites": "mlp-activation"}]}, "replaced activation functions"),
        ({"base": {"path": "owner/base", "quantization": {"kind": "qat"}}}, "rounded weights"),
    ],
)
def test_an_adapter_that_others_would_compute_otherwise_is_refused(
    own: dict[str, Any], words: str, tmp_path: Path
) -> None:
    card = {"base": {"path": "owner/base"}, "adapter": {"kind": "lora"}, "activations": []}
    (tmp_path / "artifact.json").write_text(json.dumps({**card, **own}))
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_text("weights")
    with pytest.raises(UserError, match=words):
        sent(tmp_path, dry_run=True)
    (tmp_path / "artifact.json").write_text(json.dumps(card))
    assert "adapter_model.safetensors" in sent(tmp_path, dry_run=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    recording = type("RecordingHub", (Hub,), {"sent": {}, "asked": [], "refuses": False})
    server = ThreadingHTTPServer(("127.0.0.1", 0), recording)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield recording
    server.shutdown()
    server.server_close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name, content in {
        "model.safetensors": "weights",
        "config.json": "{}",
        "README.md": "# A model\n",
        "artifact.json": '{"base": {"path": "/home/me"}, "adapter": {"kind": "lora"}}',
        "notes.log": "x",
    }.items():
        (tmp_path / name).write_text(content)
    return tmp_path


def sent(folder: Path, repository: str = "me/model", *, dry_run: bool = False) -> str:
    return "\n".join(push.main(PushOptions(folder=str(folder), repository=repository, dry_run=dry_run)))


def test_weights_config_and_card_go_and_nothing_of_this_machine(hub: type[Hub], model: Path) -> None:
    said = sent(model)
    assert hub.sent == {"model.safetensors": b"weights", "config.json": b"{}", "README.md": b"# A model\n"}
    assert hub.asked[0] == ("/api/repos/create", f"Bearer {TOKEN}")
    assert said.startswith("to me/model (private):")
    assert TOKEN not in said


def test_a_dry_run_asks_nobody_anything(hub: type[Hub], model: Path) -> None:
    said = sent(model, dry_run=True)
    assert not hub.asked
    assert "model.safetensors" in said
    assert "not sent: artifact.json, notes.log" in said
    assert said.endswith("nothing has been sent")


def test_without_a_token_nothing_is_sent(hub: type[Hub], model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="no token for the hub") as refused:
        sent(model)
    assert "hf auth login" in (refused.value.remedy or "")
    assert not hub.asked


def test_what_the_hub_refuses_is_told_in_its_words(hub: type[Hub], model: Path) -> None:
    hub.refuses = True
    with pytest.raises(UserError, match="the hub has not taken me/model: "):
        sent(model)


def test_a_secret_in_a_file_stops_all(hub: type[Hub], model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"note": TOKEN}))
    with pytest.raises(UserError, match="looks like a secret"):
        sent(model)
    assert not hub.asked


@pytest.mark.parametrize("name", ["a/b/c", "a b", ""])
def test_a_bad_name_is_refused_first(model: Path, name: str) -> None:
    with pytest.raises(UserError, match="is no name of a repository"):
        sent(model, name)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no weights"):
        sent(tmp_path)


def test_a_base_that_only_this_machine_has_is_told(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/base"}')
    assert "names its base by a folder of this machine, /home/me/base" in sent(model, dry_run=True)
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    assert "of this machine" not in sent(model, dry_run=True)
