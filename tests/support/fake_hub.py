"""A Hugging Face Hub in memory: what huggingface_hub 2.4 asks of one to create, fill, list and download repositories.

It checks tokens, stores weights through LFS and the rest in commits, and fails where a test asks for it. It leaves out
what no test needs: Xet, branches, pull requests, more than one organisation.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_good": "alice", "hf_bob": "bob", "hf_reads": "alice", "hf_narrow": "alice", "hf_fine": "alice"}
_SCOPED = {"hf_narrow": ["repo.content.read"], "hf_fine": ["repo.content.read", "repo.write"]}
_REPO = r"(?:(?P<kind>datasets|models)/)?(?P<repo>[^/]+/[^/]+)"


@dataclass(frozen=True)
class StoredFile:
    data: bytes
    is_lfs: bool

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, StoredFile]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)

    def add(self, title: str, files: dict[str, StoredFile]) -> Commit:
        content = [len(self.commits), title, {path: file.sha256 for path, file in files.items()}]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits.append(Commit(oid, title, files))
        return self.commits[-1]

    def at(self, revision: str) -> Commit:
        for commit in reversed(self.commits):
            if revision in ("main", commit.oid):
                return commit
        raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


@dataclass
class Fault:
    pattern: str
    status: int
    times: int


class RefusalError(Exception):
    """An answer other than 200; the code is what huggingface_hub makes an exception of."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass
class FakeHub:
    """The Hub's content, and what a test sets and sees of it."""

    home: Path
    """The cache of clients in other processes."""
    url: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded for LFS, by its sha256."""
    changed: dict[str, bytes | None] = field(default_factory=dict)
    """What commits hold in the place of what was uploaded; None where they hold nothing."""
    names_xet: bool = False
    """Whether large files are said to be on Xet, whose servers are not there."""
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """`GET /api/whoami-v2`, in the order in which they came."""

    def fail(self, pattern: str, status: int = 503, *, times: int = 1) -> None:
        """Answer the next requests like `POST .*/commit/` with an error."""
        self.faults.append(Fault(pattern, status, times))

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use this Hub."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(self.home)}


class _Request(BaseHTTPRequestHandler):
    hub: FakeHub
    lock: threading.Lock
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            with self.lock:
                self.hub.requests.append(f"{self.command} {path}")
                self.check_faults()
                self.check_token()
                self.route(path)
        except RefusalError as refusal:
            self.answer({"error": str(refusal)}, status=refusal.status, headers=refusal.headers)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815  # http.server calls them so

    def answer(self, value: Any = None, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def check_faults(self) -> None:
        for fault in self.hub.faults:
            if fault.times and re.search(fault.pattern, self.hub.requests[-1]):
                fault.times -= 1
                raise RefusalError(fault.status, "a fault that the test asked for")

    def check_token(self) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        self.token, self.user = token, TOKENS.get(token)

    def check_writer(self, owner: str | None) -> None:
        if self.user is None:
            raise RefusalError(401, "Invalid username or password.")
        if owner != self.user:
            raise RefusalError(403, f"You don't have the rights to write under the namespace {owner}")

    def route(self, path: str) -> None:
        for pattern, action in _ROUTES.items():
            if found := re.fullmatch(pattern, path):
                return action(self, **found.groupdict())
        raise RefusalError(404, f"the fake Hub has no {path}")

    def repo(self, kind: str | None, repo: str) -> Repo:
        """The repository; a private one exists for its owner alone."""
        found = self.hub.repos.get((kind or "models", repo))
        if found is None or (found.private and self.user != repo.split("/")[0]):
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        return found

    def whoami(self) -> None:
        self.check_writer(self.user)
        access: dict[str, Any] = {"role": "read" if self.token == "hf_reads" else "write"}
        if self.token in _SCOPED:
            scope = {"entity": {"type": "user", "name": self.user}, "permissions": _SCOPED[self.token]}
            access = {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}
        auth = {"type": "access_token", "accessToken": access}
        self.answer({"type": "user", "name": self.user, "orgs": [], "auth": auth})

    def validate_yaml(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user
        self.check_writer(owner)
        kind, name = f"{asked.get('type') or 'model'}s", f"{owner}/{asked['name']}"
        exists = (kind, name) in self.hub.repos
        if not exists:
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.hub.repos[kind, name] = Repo(private)
            self.hub.repos[kind, name].add("initial commit", {})
        url = f"{self.hub.url}/{name}" if kind == "models" else f"{self.hub.url}/{kind}/{name}"
        self.answer({"id": name, "name": name, "url": url}, status=409 if exists else 200)

    def info(self, kind: str, repo: str, revision: str | None = None) -> None:
        found = self.repo(kind, repo)
        commit = found.at(revision or "main")
        files = [{"rfilename": path} for path in commit.files]
        self.answer({"id": repo, "sha": commit.oid, "private": found.private, "tags": [], "siblings": files})

    def tree(self, kind: str, repo: str, revision: str, under: str | None) -> None:
        files = self.repo(kind, repo).at(revision).files
        self.answer(
            [
                {"type": "file", "path": path, "oid": file.git_oid, "size": len(file.data)}
                | ({"lfs": {"oid": file.sha256, "size": len(file.data), "pointerSize": 134}} if file.is_lfs else {})
                for path, file in files.items()
                if path.startswith(under or "")
            ]
        )

    def commits(self, kind: str, repo: str, revision: str) -> None:
        commits = self.repo(kind, repo).commits
        at = commits.index(self.repo(kind, repo).at(revision))
        known = {"authors": [], "date": "2026-01-01T00:00:00.000Z", "message": ""}
        self.answer([{"id": c.oid, "title": c.title} | known for c in reversed(commits[: at + 1])])

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        self.check_writer(repo.split("/")[0])
        files = self.repo(kind, repo).at(revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            # By this the client leaves out what is there already.
            there = files[path].etag if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there})
        self.answer({"files": answers})

    def lfs_batch(self, kind: str | None, repo: str) -> None:
        self.check_writer(repo.split("/")[0])
        objects = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
            objects.append(asked if asked["oid"] in self.hub.blobs else asked | {"actions": upload})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusalError(400, "the bytes are not those of the hash")
        self.hub.blobs[oid] = self.body
        self.answer({})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        self.check_writer(repo.split("/")[0])
        found = self.repo(kind, repo)
        files = dict(found.at(revision).files)
        title = ""
        for line in self.body.splitlines():
            operation, value = json.loads(line).values()
            if operation == "header":
                title = value["summary"]
            elif operation == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), is_lfs=False)
            elif operation == "lfsFile":
                files[value["path"]] = StoredFile(self.hub.blobs[value["oid"]], is_lfs=True)
            else:
                raise RefusalError(400, f"the fake Hub has no {operation}")
        for path, data in self.hub.changed.items():
            pushed = files.pop(path)
            if data is not None:
                files[path] = StoredFile(data, pushed.is_lfs)
        commit = found.add(title, files)
        url = f"{self.hub.url}/{repo}/commit/{commit.oid}"
        self.answer({"success": True, "commitOid": commit.oid, "commitUrl": url})

    def resolve(self, kind: str | None, repo: str, revision: str, path: str) -> None:
        commit = self.repo(kind, repo).at(revision)
        if path not in commit.files:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"'}
        if self.hub.names_xet and file.is_lfs:
            headers |= {"X-Xet-Hash": file.sha256, "X-Xet-Refresh-Route": f"{self.hub.url}/api/xet-read-token"}
        self.answer(file.data, headers=headers)


_API = "/api/" + _REPO
_ROUTES: dict[str, Callable[..., None]] = {
    "/api/whoami-v2": _Request.whoami,
    "/api/validate-yaml": _Request.validate_yaml,
    "/api/repos/create": _Request.create,
    _API + "(?:/revision/(?P<revision>.+))?": _Request.info,
    _API + "/tree/(?P<revision>[^/]+)(?:/(?P<under>.*))?": _Request.tree,
    _API + "/commits/(?P<revision>[^/]+)": _Request.commits,
    _API + "/preupload/(?P<revision>[^/]+)": _Request.preupload,
    _API + "/commit/(?P<revision>[^/]+)": _Request.commit,
    f"/{_REPO}.git/info/lfs/objects/batch": _Request.lfs_batch,
    "/lfs/(?P<oid>.+)": _Request.lfs_upload,
    f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)": _Request.resolve,
}


@contextlib.contextmanager
def serve_hub(home: Path) -> Iterator[FakeHub]:
    hub = FakeHub(home)
    handler = type("Request", (_Request,), {"hub": hub, "lock": threading.Lock()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
