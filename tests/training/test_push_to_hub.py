"""Pushing to the hub: what a server receives is what lies on the disk; nothing is trained in vain."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loco_diffusion.cli import main
from loco_diffusion.errors import UserError
from loco_diffusion.training.hub import check_push, push


class Hub(ThreadingHTTPServer):
    """As much of the Hugging Face Hub as an upload needs: it keeps what it is sent.

    Attributes:
        created: names of repositories.
        files: received contents by path.
        refuse: answer uploads with 403.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.created: list[str] = []
        self.files: dict[str, bytes] = {}
        self.refuse = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self._answer({"error": "no token"}, 401)
        if self.path == "/api/validate-yaml":  # of the model card
            return self._answer({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            name = "/".join(filter(None, (json.loads(body).get("organization"), json.loads(body)["name"])))
            self.server.created.append(name)
            return self._answer({"url": f"{self.server.address}/{name}", "id": name})
        if self.server.refuse:
            return self._answer({"error": "read only"}, 403)
        if self.path.endswith("/preupload/main"):
            files = [
                {**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        assert self.path.partition("?")[0].endswith("/commit/main"), self.path
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self._answer(
            {
                "commitUrl": f"{self.server.address}/owner/canny/commit/{'0' * 40}",
                "commitOid": "0" * 40,
                "success": True,
            }
        )

    def do_GET(self) -> None:
        if self.path.endswith("/auth-check/write"):
            allowed = self.headers.get("Authorization") == "Bearer hf_test"
            return self._answer({}, 200 if allowed else 403)
        if "/api/models/owner/canny" in self.path:
            return self._answer({"id": "owner/canny", "sha": "0" * 40, "siblings": [], "tags": []})
        return self._answer({"error": "not found"}, 404)

    def _answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Be quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.usefixtures("workplace")
def test_the_trained_adapter_arrives_whole(
    hub: Hub, flux_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("config.yaml").write_text(
        f"""
        condition: canny
        output: run
        base: {flux_folder}
        data: {{source: scenes, count: 2, size: 32}}
        adapter: {{options: {{r: 1, num_rotations: 1}}}}
        steps: 1
        batch_size: 2
        validation: {{pictures: 1, steps: 1}}
        """
    )
    assert main(["train", "config.yaml", "--push-to-hub", "owner/canny"]) == 0
    assert "Pushed it to owner/canny" in capfd.readouterr().out
    assert hub.created == ["owner/canny"]
    folder = Path("run/adapter")
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(hub.files) == 7 and b'load_adapter("owner/canny")' in hub.files["README.md"]

    hub.refuse = True
    with pytest.raises(
        UserError, match=r"adapter is in run/adapter, but was not pushed .* hf upload owner/canny"
    ):
        push(folder, "owner/canny")


@pytest.mark.usefixtures("workplace")
def test_nothing_is_trained_that_cannot_be_pushed(
    hub: Hub,
    flux_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"{{condition: canny, output: run, base: {flux_folder}, steps: 1, data: {{source: scenes, size: 32}}}}"
    )
    with pytest.raises(UserError, match="'canny' is no repository of the Hugging Face Hub; give OWNER/NAME"):
        check_push("canny")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="owner/canny cannot be written on the Hugging Face Hub"):
        check_push("owner/canny")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert main(["train", str(config), "--push-to-hub", "owner/canny"]) == 2
    assert "Nobody is logged in to the Hugging Face Hub" in capfd.readouterr().err
    assert not list(Path("run").rglob("*"))
