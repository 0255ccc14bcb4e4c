# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A loopback server with the parts of the Hub's HTTP API that publishing and loading use."""

import base64
import hashlib
import json
import re
import runpy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, hf_api
from transformers.utils import hub as transformers_hub


TOKEN = "hf_loopback"
USER = "somebody"


class Hub:
    """
    The server, a context manager.

    Attributes:
        endpoint (`str`): Value for `HF_ENDPOINT`.
        repos (`dict[str, list[dict[str, bytes]]]`): Files of each commit of each repository; the first commit is
            empty. Names of data sets and Spaces have their prefix, such as "spaces/somebody/watch".
        sdks (`dict[str, str]`): The SDK of each Space.
        variables (`dict[str, dict[str, str]]`): The variables of each Space.
        requests (`list[str]`): The requests so far, such as "POST /api/repos/create".
        failures (`list[str]`): Regular expressions. The next request that matches one loses its connection, and the
            expression leaves the list.
        stored (`dict[str, bytes]`): Large files by SHA-256.
        private (`set[str]`): Repositories that only the token's owner can see.
    """

    def __enter__(self) -> "Hub":
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failures: list[str] = []
        self.private: set[str] = set()
        self.sdks: dict[str, str] = {}
        self.variables: dict[str, dict[str, str]] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Any) -> dict[str, str]:
        """Return variables that make a process use this server, with its cache in a folder, and without Xet."""
        offline = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(home), **offline}

    @contextmanager
    def used_here(self, home: Any) -> Iterator[None]:
        """Let this process use the server. `huggingface_hub` reads its variables once, while it is imported."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment(home).items():
                patch.setenv(name, value)
            for name, value in runpy.run_path(constants.__file__, run_name="huggingface_hub.constants").items():
                if name.isupper():
                    patch.setattr(constants, name, value)
            patch.setattr(hf_api.api, "endpoint", self.endpoint)
            if "datasets" in sys.modules:
                config = sys.modules["datasets"].config
                patch.setattr(config, "HF_HUB_OFFLINE", False)
                patch.setattr(config, "HF_ENDPOINT", self.endpoint)
                patch.setattr(config, "HF_DATASETS_CACHE", Path(home) / "datasets")
            # Transformers keeps the client of its first call.
            patch.setattr(transformers_hub, "_hf_api", None, raising=False)
            yield

    def files(self, repo: str) -> dict[str, bytes]:
        """Return the files of the newest commit."""
        return self.repos[repo][-1]

    def revision(self, repo: str, name: str) -> int | None:
        """Return the number of a commit, given "main" or its hash."""
        commits = self.repos[repo]
        if name == "main":
            return len(commits) - 1
        return next((i for i in range(len(commits)) if commit_hash(repo, i) == name), None)


def commit_hash(repo: str, index: int) -> str:
    """Return the hash of a commit, given its number."""
    return hashlib.sha1(f"{repo}@{index}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body, path = self.rfile.read(length), unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for pattern in self.hub.failures:
            if re.search(pattern, self.hub.requests[-1]):
                self.hub.failures.remove(pattern)
                self.close_connection = True
                return
        for method, pattern, respond in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                respond(self, body, **match.groupdict())
                return
        self._json(404, {"error": f"nothing at {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, status: int, body: Any, **headers: str) -> None:
        self._send(status, json.dumps(body).encode(), Content_Type="application/json", **headers)

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._json(401, {"error": "Invalid username or password."})
        return False

    def _missing(self, kind: str) -> None:
        self._json(404, {"error": f"{kind} not found"}, X_Error_Code=f"{kind}NotFound")

    def _commit(self, repo: str, revision: str | None) -> tuple[int, dict[str, bytes]] | None:
        """Return number and files of a commit. If it does not exist, send the error and return `None`."""
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo not in self.hub.repos or (repo in self.hub.private and not is_known):
            self._missing("Repo")
            return None
        index = self.hub.revision(repo, revision or "main")
        if index is None:
            self._missing("Revision")
            return None
        return index, self.hub.repos[repo][index]

    # Routes

    def whoami(self, _body: bytes) -> None:
        if self._may_write():
            self._json(200, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {}})

    def create(self, body: bytes) -> None:
        if not self._may_write():
            return
        asked = json.loads(body)
        kind = asked.get("type") or "model"
        repo = f"{asked['organization'] or USER}/{asked['name']}"
        repo = repo if kind == "model" else f"{kind}s/{repo}"
        url = f"{self.hub.endpoint}/{repo}"
        if repo in self.hub.repos:
            self._json(409, {"error": "You already created this repo", "url": url})
            return
        self.hub.repos[repo] = [{}]
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
        if kind == "space":
            self.hub.sdks[repo] = asked["sdk"]
        self._json(200, {"url": url, "name": repo, "id": repo})

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        self._json(400 if errors else 200, {"errors": errors, "warnings": []})

    def variables(self, body: bytes, repo: str) -> None:
        repo = f"spaces/{repo}"
        if not self._may_write() or self._commit(repo, None) is None:
            return
        variables = self.hub.variables.setdefault(repo, {})
        asked = json.loads(body or b"{}")
        if self.command == "POST":
            variables[asked["key"]] = asked["value"]
        elif self.command == "DELETE":
            variables.pop(asked["key"], None)
        self._json(200, {key: {"value": value} for key, value in variables.items()})

    def info(self, _body: bytes, kind: str, repo: str, revision: str | None = None) -> None:
        repo = _name(kind, repo)
        found = self._commit(repo, revision)
        if found:
            files = [{"rfilename": path} for path in found[1]]
            about = {"id": repo, "sha": commit_hash(repo, found[0]), "siblings": files, "tags": []}
            about["private"] = repo in self.hub.private
            self._json(200, {**about, "downloads": 0, "likes": 0})

    def tree(self, _body: bytes, kind: str, repo: str, revision: str, folder: str | None = None) -> None:
        found = self._commit(_name(kind, repo), revision)
        if not found:
            return
        below = "" if folder is None else f"{folder}/"
        files = {path: data for path, data in found[1].items() if path.startswith(below)}
        if below and not files:
            self._missing("Entry")
            return
        folders = {str(folder) for path in files for folder in PurePosixPath(path).parents} - {".", folder}
        entries = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        entries = [entry for entry in entries if entry["path"].startswith(below)]
        entries += [_entry(path, data) for path, data in files.items()]
        is_deep = "recursive=true" in self.path.lower()
        self._json(200, [x for x in entries if is_deep or "/" not in x["path"].removeprefix(below)])

    def paths_info(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        found = self._commit(_name(kind, repo), revision)
        if found:
            asked = json.loads(body)["paths"]
            self._json(200, [_entry(path, found[1][path]) for path in asked if path in found[1]])

    def preupload(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        if self._may_write() and self._commit(_name(kind, repo), revision):
            files = json.loads(body)["files"]
            modes = ["lfs" if file["path"].endswith(".safetensors") else "regular" for file in files]
            found = [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                for file, mode in zip(files, modes, strict=True)
            ]
            self._json(200, {"files": found})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        if not self._may_write():
            return
        objects = []
        for item in json.loads(body)["objects"]:
            known = item["oid"] in self.hub.stored
            upload = {"upload": {"href": f"{self.hub.endpoint}/{repo}/upload/{item['oid']}", "header": {}}}
            objects.append(item if known else {**item, "actions": upload})
        self._json(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str, **_: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._json(400, {"error": "the hash is another"})
            return
        self.hub.stored[oid] = body
        self._send(200, b"")

    def commit(self, body: bytes, kind: str, repo: str, revision: str) -> None:
        repo = _name(kind, repo)
        found = self._commit(repo, revision) if self._may_write() else None
        if not found:
            return
        files = dict(found[1])
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        self.hub.repos[repo].append(files)
        oid = commit_hash(repo, len(self.hub.repos[repo]) - 1)
        self._json(200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def resolve(self, _body: bytes, repo: str, revision: str, path: str) -> None:
        found = self._commit(repo, revision)
        if not found:
            return
        commit = {"X_Repo_Commit": commit_hash(repo, found[0])}
        if path not in found[1]:
            self._json(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **commit)
            return
        data = found[1][path]
        commit["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            self._send(200, data, **commit)
            return
        first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
        self._send(206, data[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(data)}", **commit)


def _name(kind: str, repo: str) -> str:
    return repo if kind == "models" else f"{kind}/{repo}"


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if path.endswith(".safetensors"):
        oid = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": oid, "sha256": oid, "size": len(data), "pointerSize": 130}
    return entry


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET POST DELETE", rf"/api/spaces/{_REPO}/variables", _Handler.variables),
    ("GET", rf"{_API}(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", r"/(?P<repo>(?:datasets/|spaces/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/(?P<repo>.+)/upload/(?P<oid>[0-9a-f]+)", _Handler.lfs_upload),
    (
        "GET HEAD",
        r"/(?P<repo>(?:datasets/|spaces/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        _Handler.resolve,
    ),
]
