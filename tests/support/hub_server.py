"""A small Hub on loopback, for the real client: repositories with branches and commits, tokens, private repositories.

It knows three tokens: "hf_writer" may do everything in the namespaces "me" and "you", "hf_reader" may read all, and
anything else is nobody. It answers as the real one does where the client cares (status codes and `X-Error-Code`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writer", "hf_reader"


@dataclass
class Repo:
    """One repository: the files of each commit, and the commits that branches stand at."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class Hub:
    """The server. `repos` holds what was pushed, `messages` those of the commits; when `full`, no large file fits."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.full = False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Refusal(Exception):
    """Status, message and error code of an answer that is no success."""


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one segment

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        path = unquote(urlsplit(self.path).path)
        verb = "GET" if self.command == "HEAD" else self.command
        try:
            for (method, pattern), answer in ROUTES.items():
                match = re.fullmatch(pattern, path)
                if match and method == verb:
                    return answer(self, *match.groups())
            raise Refusal(404, f"No such route: {path}", "")
        except Refusal as refusal:
            status, message, code = refusal.args
            self.answer(
                {"error": message}, status, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
            )

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    # rights

    def repo(self, name: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.token not in (WRITER, READER)):
            # without a token the Hub does not tell what is missing from what is private
            known = self.token in (WRITER, READER)
            raise Refusal(404 if known else 401, "Repository not found", "RepoNotFound")
        if write:
            self.check_write(name)
        return repo

    def check_write(self, name: str) -> None:
        if self.token not in (WRITER, READER):
            raise Refusal(401, "Invalid username or password.", "")
        if self.token == READER or not name.startswith(("me/", "you/")):
            raise Refusal(403, "You don't have the rights to write to this repository", "")

    def files(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self.repo(name)
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repo.commits[commit]

    # routes

    def create(self) -> None:
        data = json.loads(self.body)
        name = f"{data.get('organization') or 'me'}/{data['name']}"
        self.check_write(name)
        exists = name in self.hub.repos
        if not exists:
            self.hub.repos[name] = Repo(private=data.get("visibility") == "private" or bool(data.get("private")))
        self.answer({"url": f"{self.hub.url}/{name}", "name": name}, 409 if exists else 200)

    def validate(self) -> None:
        header = re.search(r"^base_model: *['\"]?([^'\"\n]*)", json.loads(self.body)["content"], re.MULTILINE)
        bad = header and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", header[1])
        errors = [{"message": '"base_model" must be a Hub model id'}] if bad else []
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name: str, revision: str) -> None:
        self.repo(name, write=True)
        files = [
            {"path": x["path"], "uploadMode": "lfs" if x["path"].endswith((".safetensors", ".png")) else "regular"}
            for x in json.loads(self.body)["files"]
        ]
        self.answer({"files": [{**item, "shouldIgnore": False} for item in files]})

    def batch(self, name: str) -> None:
        self.repo(name, write=True)
        objects = [{key: item[key] for key in ("oid", "size")} for item in json.loads(self.body)["objects"]]
        for item in objects:
            if item["oid"] not in self.hub.large:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/large/{item['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        if self.hub.full:
            raise Refusal(403, "Storage limit reached", "")
        self.hub.large[oid] = self.body
        self.answer({})

    def commit(self, name: str, revision: str) -> None:
        repo = self.repo(name, write=True)
        files = dict(self.files(name, revision)[1])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(f"{name} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[oid], repo.branches[revision] = files, oid
        self.answer({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def branch(self, name: str, branch: str) -> None:
        repo = self.repo(name, write=True)
        exists = branch in repo.branches
        repo.branches.setdefault(branch, repo.branches["main"])
        self.answer({}, 409 if exists else 200)

    def download(self, name: str, revision: str, path: str) -> None:
        commit, files = self.files(name, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        etag = hashlib.sha256(files[path]).hexdigest()
        self.answer(files[path], headers={"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    def info(self, name: str, revision: str | None = None) -> None:
        commit, files = self.files(name, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        self.answer({"id": name, "sha": commit, "private": self.repo(name).private, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        files = self.files(name, revision)[1]
        entries = [(path, data, hashlib.sha1(data).hexdigest()) for path, data in files.items()]
        self.answer([{"type": "file", "path": path, "size": len(data), "oid": oid} for path, data, oid in entries])


_NAME = r"([^/]+/[^/]+)"
ROUTES = {
    ("POST", "/api/repos/create"): Handler.create,
    ("POST", "/api/validate-yaml"): Handler.validate,
    ("POST", f"/api/models/{_NAME}/preupload/(.+)"): Handler.preupload,
    ("POST", f"/{_NAME}.git/info/lfs/objects/batch"): Handler.batch,
    ("PUT", "/large/([0-9a-f]+)"): Handler.store,
    ("POST", f"/api/models/{_NAME}/commit/(.+)"): Handler.commit,
    ("POST", f"/api/models/{_NAME}/branch/(.+)"): Handler.branch,
    ("GET", f"/api/models/{_NAME}/tree/([^/]+)"): Handler.tree,
    ("GET", f"/api/models/{_NAME}(?:/revision/([^/]+))?"): Handler.info,
    ("GET", f"/{_NAME}/resolve/([^/]+)/(.+)"): Handler.download,
}
