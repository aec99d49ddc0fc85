"""Test names of the Hub: its client against a local server, its cache, and no network."""

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from anyflow.formats import hub
from anyflow.formats.errors import CheckpointFormatError
from anyflow.formats.hub import ENCODERS, PIPELINE, HubName, local_checkpoint, local_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
FILES = [
    "model_index.json",
    "README.md",
    *(f"{part}/weights.safetensors" for part in PARTS),
    "scheduler/config.json",
]
FLAT = ["config.json", "diffusion_pytorch_model.safetensors", "models_t5.pth", "assets/logo.png"]
REPOSITORIES = {"someone/anyflow": FILES, "someone/flat": FLAT}


class _Hub(BaseHTTPRequestHandler):
    """Answer the four requests of a download; an absent repository as the Hub does."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
        name = "/".join(path.split("/")[:2])
        if name not in REPOSITORIES:
            self._answer(
                b"", 401 if "private" not in name else 403, {"X-Error-Code": _error_code(name)}
            )
        elif "/resolve/" in path:
            content = path.encode()
            digest = hashlib.sha1(content).hexdigest()
            self._answer(content, 200, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": f, "size": 1, "oid": COMMIT} for f in REPOSITORIES[name]
            ]
            self._answer(json.dumps(entries).encode(), 200, {})
        elif path.endswith("/revision/none"):
            self._answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [{"rfilename": file} for file in REPOSITORIES[name]]
            self._answer(
                json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), 200, {}
            )

    def _answer(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


def _error_code(name: str) -> str:
    return "GatedRepo" if "private" in name else "RepoNotFound"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty cache of the client's, which may use the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return _online(tmp_path / "cache", monkeypatch, True)


def _online(cache: Path, monkeypatch: pytest.MonkeyPatch, online: bool) -> Path:
    hub._snapshot.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", not online)
    huggingface_hub.close_session()  # its client keeps the setting
    return cache


@pytest.fixture
def endpoint(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the address of a hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield address
        server.shutdown()


def files_of(folder: Path) -> list[str]:
    return sorted(
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
    )


def test_only_the_files_that_are_needed_are_downloaded_and_serve_without_a_network(
    endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = local_folder("someone/anyflow", ENCODERS)
    assert files_of(encoders) == sorted(
        f for f in FILES if f.split("/")[0] in ("vae", "text_encoder", "tokenizer")
    )
    assert "resolve" in (encoders / "vae" / "weights.safetensors").read_text()
    transformer = local_checkpoint("someone/anyflow")
    assert {"transformer/weights.safetensors", "scheduler/config.json"} < set(files_of(transformer))
    assert not (transformer / "README.md").exists()
    assert files_of(local_checkpoint("someone/flat")) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    _online(cache, monkeypatch, False)
    assert (
        local_folder("someone/anyflow", PIPELINE)
        == encoders
        == local_folder(f"someone/anyflow@{COMMIT}", ENCODERS)
    )
    assert (
        local_checkpoint("someone/flat") == cache / "models--someone--flat" / "snapshots" / COMMIT
    )


def test_what_the_hub_has_not_or_does_not_give(endpoint: str) -> None:
    def refused(name: str, find: Callable[..., Path] = local_folder, *arguments: object) -> str:
        with pytest.raises(ValueError) as error:
            find(name, *arguments)
        assert "\n" not in str(error.value)
        return str(error.value)

    absent = "no folder someone/absent here, and the Hugging Face Hub has no model of this name"
    assert refused("someone/absent").startswith(absent) and "hf download" not in refused(
        "someone/absent"
    )
    assert "https://huggingface.co/someone/private" in refused("someone/private")
    assert "has no revision none" in refused("someone/anyflow@none")
    assert "is of another kind: it has no transformer/*, vae/*" in refused(
        "someone/flat", local_folder, PIPELINE
    )
    assert "it has no transformer_2/*" in refused(
        "someone/anyflow", local_checkpoint, "transformer_2"
    )


def test_a_network_that_is_absent_or_silent_is_said_with_the_line_that_downloads(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (
        "on a machine with a network run `hf download someone/anyflow --local-dir anyflow`, copy "
        "that folder here"
    )
    with socket.socket() as silent:  # takes connections and answers nothing
        silent.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed)
        with pytest.raises(ValueError, match=f"cannot be reached: {line}"):
            local_folder("someone/anyflow")
        silent.listen(1)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
        with pytest.raises(
            CheckpointFormatError, match="file or folder someone/anyflow here.*cannot be reached"
        ):
            local_checkpoint("someone/anyflow")
        _online(cache, monkeypatch, False)
        with pytest.raises(ValueError, match=rf"is not asked \(HF_HUB_OFFLINE is set\): {line}"):
            local_folder("someone/anyflow")
    with pytest.raises(
        ValueError, match="`hf download someone/anyflow --revision v2 --local-dir anyflow`"
    ):
        local_folder("someone/anyflow@v2")


def test_a_copy_that_lacks_a_part_is_not_taken_for_the_model(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _online(cache, monkeypatch, False)
    snapshot = cache / "models--someone--anyflow" / "snapshots" / COMMIT
    (snapshot / "vae").mkdir(parents=True)
    (snapshot / "vae" / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    assert local_folder("someone/anyflow", ["vae/*"]) == snapshot
    with pytest.raises(
        ValueError, match=r"its copy in the cache lacks text_encoder/\*, tokenizer/\*: on a machine"
    ):
        local_folder("someone/anyflow", ENCODERS)


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "./a/b",
        "/a/b",
        "a/b/c",
        "a",
        "~/a",
        "a/",
        "../b",
        "a/b.safetensors",
        "a\\b",
        "a/b--c",
        "a/b\n",
        "a /b",
    ],
)
def test_what_can_only_be_a_path_never_asks_the_hub(path: str, cache: Path) -> None:
    assert HubName.parse(path) is None
    if path not in (".",):
        with pytest.raises(ValueError, match="^no folder"):
            local_folder(path)


def test_local_paths_come_first(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "someone" / "anyflow").mkdir(parents=True)
    (tmp_path / "file.pt").write_bytes(b"1")
    monkeypatch.chdir(tmp_path)
    assert (
        local_folder("someone/anyflow")
        == local_checkpoint("someone/anyflow")
        == Path("someone/anyflow")
    )
    assert local_checkpoint("file.pt") == Path("file.pt")
    with pytest.raises(ValueError, match=r"file\.pt is not a folder"):
        local_folder("file.pt")
