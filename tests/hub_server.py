"""A small local server that speaks the part of the Hugging Face Hub's API that downloads use."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

Files = Mapping[str, bytes]

_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class HubRepo:
    """Files by revision name; a token makes the repository private, ``gated`` refuses everyone."""

    revisions: dict[str, Files]
    token: str | None = None
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        """Commit hash of a branch, tag or commit, None when there is none of that name."""
        commits = {name: _commit(files) for name, files in self.revisions.items()}
        return revision if revision in commits.values() else commits.get(revision)

    def files(self, commit: str) -> Files:
        return next(files for files in self.revisions.values() if _commit(files) == commit)


@dataclass
class Hub:
    """A running server: its address and what it was asked so far, as ``METHOD path``."""

    url: str
    repos: dict[str, HubRepo]
    requests: list[str] = field(default_factory=list)


@contextmanager
def serve_hub(repos: dict[str, HubRepo]) -> Iterator[Hub]:
    """Serve ``repos`` on a free local port until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", repos)
    server.hub = hub  # type: ignore[attr-defined]
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _commit(files: Files) -> str:
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name])
    return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        if match := _API.fullmatch(path) or _FILE.fullmatch(path):
            self._route(hub.repos.get(match["repo"]), match)
        else:
            self._error(HTTPStatus.NOT_FOUND, "NotFound")

    do_HEAD = do_GET

    def _route(self, repo: HubRepo | None, match: re.Match[str]) -> None:
        if repo is None or (repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}"):
            self._error(HTTPStatus.UNAUTHORIZED, "RepoNotFound")
            return
        if repo.gated:
            self._error(HTTPStatus.FORBIDDEN, "GatedRepo")
            return
        commit = repo.commit(match["revision"] or "main")
        if commit is None:
            self._error(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        elif match.re is _FILE:
            self._file(repo.files(commit), commit, match["file"])
        else:
            self._api(match["repo"], match["what"], repo.files(commit), commit)

    def _api(self, name: str, what: str | None, files: Files, commit: str) -> None:
        tree = [
            {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for file, data in files.items()
        ]
        info = {"id": name, "sha": commit, "private": False, "siblings": [{"rfilename": file} for file in files]}
        self._answer(HTTPStatus.OK, json.dumps(tree if what == "tree" else info).encode(), "application/json")

    def _file(self, files: Files, commit: str, name: str) -> None:
        if name not in files:
            self._error(HTTPStatus.NOT_FOUND, "EntryNotFound")
            return
        etag = hashlib.sha1(files[name]).hexdigest()
        self._answer(
            HTTPStatus.OK, files[name], "application/octet-stream", {"ETag": f'"{etag}"', "X-Repo-Commit": commit}
        )

    def _error(self, status: HTTPStatus, code: str) -> None:
        self._answer(status, json.dumps({"error": code}).encode(), "application/json", {"X-Error-Code": code})

    def _answer(self, status: HTTPStatus, body: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
