"""Where adapters are found: local folders, folders bound to a root, and the Hub through its real client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_dist.core.errors import AdapterError
from peft_dist.runner.adapter_source import resolve_adapter
from tests.hub_server import Hub, HubRepo, serve_hub

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OLD = {CONFIG: b"{}", WEIGHTS: b"old weights", "README.md": b"never fetched"}
NEW = {CONFIG: b"{}", WEIGHTS: b"new weights", "adapter_model.bin": b"never fetched"}

_RESOLVE = """
import json, sys
from peft_dist.core.errors import AdapterError
from peft_dist.runner.adapter_source import resolve_adapter
try:
    folder = resolve_adapter(sys.argv[1], allow_pickle=sys.argv[2:] == ["pickle"])
    print(json.dumps({"folder": str(folder), "files": {f.name: f.read_text() for f in folder.iterdir()}}))
except AdapterError as error:
    print(json.dumps({"error": str(error)}))
"""


def resolve_in_process(hub: Hub | None, home: Path, name: str, *arguments: str, **environment: str) -> dict[str, str]:
    """The Hub's client reads its settings when it is imported: every call has a process of its own."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", _RESOLVE, name, *arguments],
        env={**inherited, **settings, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return dict(json.loads(done.stdout), log=done.stderr)


@pytest.fixture(scope="module")
def hub():
    repos = {
        "org/sql": HubRepo({"main": NEW, "v1": OLD}),
        "org/secret": HubRepo({"main": OLD}, token="hf_right"),
        "org/gated": HubRepo({"main": OLD}, gated=True),
        "org/pickle": HubRepo({"main": {CONFIG: b"{}", "adapter_model.bin": b"pickled"}}),
        "org/dataset": HubRepo({"main": {"data.csv": b"1"}}),
    }
    with serve_hub(repos) as running:
        yield running


def test_hub_download_then_offline_from_cache(hub, tmp_path):
    first = resolve_in_process(hub, tmp_path, "org/sql")
    assert first["files"] == {CONFIG: "{}", WEIGHTS: "new weights"}
    assert first["folder"].startswith(str(tmp_path))
    asked = len(hub.requests)
    again = resolve_in_process(hub, tmp_path, "org/sql", HF_HUB_OFFLINE="1")
    assert again["folder"] == first["folder"]
    assert len(hub.requests) == asked


def test_hub_cache_serves_when_the_hub_is_down(hub, tmp_path):
    first = resolve_in_process(hub, tmp_path, "org/sql")
    assert resolve_in_process(None, tmp_path, "org/sql")["folder"] == first["folder"]


def test_hub_revision(hub, tmp_path):
    assert resolve_in_process(hub, tmp_path, "org/sql@v1")["files"][WEIGHTS] == "old weights"
    commit = HubRepo({"v1": OLD}).commit("v1")
    assert resolve_in_process(hub, tmp_path, f"org/sql@{commit}")["files"][WEIGHTS] == "old weights"


def test_hub_progress_is_shown(hub, tmp_path):
    assert "Fetching 2 files" in resolve_in_process(hub, tmp_path, "org/sql")["log"]


def test_hub_token(hub, tmp_path):
    refused = resolve_in_process(hub, tmp_path, "org/secret")
    assert "HF_TOKEN" in refused["error"]
    wrong = resolve_in_process(hub, tmp_path, "org/secret", HF_TOKEN="hf_wrong")
    assert "HF_TOKEN" in wrong["error"]
    assert "hf_wrong" not in wrong["error"] + wrong["log"]
    assert resolve_in_process(hub, tmp_path, "org/secret", HF_TOKEN="hf_right")["files"][WEIGHTS] == "old weights"


def test_hub_pickle_only_when_allowed(hub, tmp_path):
    assert resolve_in_process(hub, tmp_path, "org/pickle")["files"] == {CONFIG: "{}"}
    allowed = resolve_in_process(hub, tmp_path, "org/pickle", "pickle")
    assert allowed["files"]["adapter_model.bin"] == "pickled"
    assert "adapter_model.bin" not in resolve_in_process(hub, tmp_path, "org/sql", "pickle")["files"]


@pytest.mark.parametrize(
    ("name", "environment", "words"),
    [
        ("org/none", {}, "neither a local folder nor on the Hub"),
        ("org/sql@v9", {}, "no such revision"),
        ("org/gated", {}, "gated"),
        ("org/dataset", {}, "holds no adapter_config.json"),
        ("org/sql", {"HF_HUB_OFFLINE": "1"}, "not in the Hub's cache, and HF_HUB_OFFLINE is set"),
        ("org/sql", {"HF_ENDPOINT": "http://127.0.0.1:1"}, "Hub cannot be reached"),
        ("org/a--b", {}, "nor a valid Hub id"),
    ],
)
def test_hub_errors(hub, tmp_path, name, environment, words):
    answer = resolve_in_process(hub, tmp_path, name, **environment)
    assert words in answer["error"]
    assert name.split("@")[0] in answer["error"]


def test_local_folder(tmp_path, monkeypatch):
    (tmp_path / "org" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_adapter("org/a", allow_hub=False) == tmp_path / "org" / "a"
    assert resolve_adapter(str(tmp_path / "org" / "a")) == tmp_path / "org" / "a"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_adapter("~/org/a") == tmp_path / "org" / "a"


@pytest.mark.parametrize("name", ["no such folder", "/no/such/folder", "a/b/c", "", "a\0b", "x" * 5000, "a/b@../../c"])
def test_neither_folder_nor_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root in (None, tmp_path):
        with pytest.raises(AdapterError):
            resolve_adapter(name, root=root)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / WEIGHTS).touch()
    with pytest.raises(AdapterError, match="is a file"):
        resolve_adapter(str(tmp_path / WEIGHTS))
    with pytest.raises(AdapterError, match="is a file"):
        resolve_adapter(WEIGHTS, root=tmp_path)


def test_hub_can_be_off(tmp_path):
    with pytest.raises(AdapterError, match="--allow-hub-load"):
        resolve_adapter("org/a", root=tmp_path, allow_hub=False)


@pytest.fixture
def bound(tmp_path):
    """A root with one good adapter, and a folder beside it that nobody may reach."""
    root, outside = tmp_path / "root", tmp_path / "root-secret"
    for folder in (root / "good", outside / "a"):
        folder.mkdir(parents=True)
        for file in (CONFIG, WEIGHTS):
            (folder / file).write_text("x")
    return root


def test_inside_the_root(bound):
    assert resolve_adapter("good", root=bound, allow_hub=False) == bound / "good"
    assert resolve_adapter(str(bound / "good"), root=bound, allow_hub=False) == bound / "good"
    assert resolve_adapter("x/../good/.", root=bound, allow_hub=False) == bound / "good"
    (bound / "alias").symlink_to(bound / "good")
    assert resolve_adapter("alias", root=bound, allow_hub=False) == bound / "good"


def test_root_may_itself_be_a_link(bound, tmp_path):
    (tmp_path / "link").symlink_to(bound)
    assert resolve_adapter("good", root=tmp_path / "link", allow_hub=False) == bound / "good"
    assert resolve_adapter(str(tmp_path / "link" / "good"), root=tmp_path / "link") == bound / "good"


@pytest.mark.parametrize(
    "name",
    ["../root-secret/a", "good/../../root-secret/a", "..", "/etc", "../nothing-there", "../root-secret", "//etc"],
)
@pytest.mark.parametrize("allow_hub", [True, False])
def test_names_that_leave_the_root(bound, name, allow_hub):
    with pytest.raises(AdapterError, match="leads out of the adapter folder"):
        resolve_adapter(name, root=bound, allow_hub=allow_hub)


def test_links_that_leave_the_root(bound):
    (bound / "linked").symlink_to(bound.parent / "root-secret" / "a")
    (bound / "loop").symlink_to("loop")
    (bound / "up").symlink_to("..")
    for name in ("linked", "up/root-secret/a", "linked/../a"):
        with pytest.raises(AdapterError, match="leads out"):
            resolve_adapter(name, root=bound)
    with pytest.raises(AdapterError):
        resolve_adapter("loop", root=bound)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, "adapter_model.bin"])
def test_files_that_leave_the_root(bound, file):
    (bound / "good" / file).unlink(missing_ok=True)
    (bound / "good" / file).symlink_to(bound.parent / "root-secret" / "a" / WEIGHTS)
    with pytest.raises(AdapterError, match="leads out"):
        resolve_adapter("good", root=bound)
