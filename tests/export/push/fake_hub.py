"""A hub over HTTP that keeps what it gets, checks its SHA-256, and fails when told to.

It speaks what ``huggingface_hub`` asks of the real one: who am I, create, preupload, the LFS batch with uploads in one
part or several, the token of xet storage, commits, paths, trees and downloads.  Xet storage itself is a folder, which
``hf_xet`` writes and reads where its address begins with ``local://``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_aSecretOfThisTest0123456789abcdef"  # noqa: S105 - of the fake hub alone
_LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Entry:
    """A file of a commit: its bytes, or the SHA-256 and size of what lies in storage."""

    content: bytes | None = None
    oid: str = ""
    size: int = 0


@dataclass
class Repo:
    """A repository: every commit's files, and the branches that name commits."""

    private: bool
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Mapping[str, Entry]) -> str:
        """Add a commit and let the branch name it."""
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()  # noqa: S324 - as git's
        self.commits[oid], self.branches[branch] = dict(files), oid
        return oid


@dataclass
class Fault:
    """What a request that matches gets: a status, a cut connection, or, once it is done, no answer."""

    match: str
    status: int = 0
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = ""
    cut_after: int | None = None
    after: bool = False


class FakeHub:
    """The hub; ``url`` is its endpoint.

    Args:
        xet: a folder for xet storage; without one the hub has none, and files come by LFS.
        part_bytes: the size of a part, where large files come in parts.

    Attributes:
        repos: the repositories.
        store: what was uploaded by LFS, by SHA-256.
        seen: how often each ``METHOD path`` was asked for.
        authorized: every Authorization header that came to the hub; ``authorized_store``, to its storage.
        ranges: every part of a file that was asked for, as name, beginning and end.
        rate: bytes a second at which uploads are read; None for at once.
        arrived: bytes of uploads read so far.
        tamper: what is done to a file's hash in what the hub says of it afterwards.
    """

    def __init__(self, *, xet: Path | None = None, part_bytes: int | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.seen: Counter[str] = Counter()
        self.authorized: set[str] = set()
        self.authorized_store: set[str] = set()
        self.faults: list[Fault] = []
        self.ranges: list[tuple[str, int, int]] = []
        self.rate: int | None = None
        self.arrived = 0
        self.tamper: Callable[[str, str], str] = lambda _name, digest: digest
        self.xet, self.part_bytes = xet, part_bytes
        self.xet_hashes: dict[str, str] = {}
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            served = hub

        class Http(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:  # a client that was killed is what some tests are about
                pass

        self.server = Http(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()

    def fail(self, match: str, status: int = 0, **how: Any) -> None:
        """Let requests whose ``METHOD path`` matches a pattern fail: :class:`Fault`."""
        self.faults.append(Fault(match, status, **how))

    def fault_of(self, request: str) -> Fault | None:
        """What a request is to get instead of its answer, for one time less."""
        found = next((fault for fault in self.faults if fault.times and re.search(fault.match, request)), None)
        if found is not None:
            found.times -= 1
        return found

    def lose(self, match: str) -> None:
        """Let one request that matches be done, and its answer be lost."""
        self.faults.append(Fault(match, after=True))

    def add_repo(self, repo: str, *, private: bool = False) -> Repo:
        """A new repository with the one file that the real hub begins with."""
        made = self.repos[repo] = Repo(private)
        made.commit("main", {".gitattributes": Entry(b"*.safetensors filter=lfs\n")})
        return made

    def files(self, repo: str, revision: str = "main") -> dict[str, Entry]:
        """What a revision holds."""
        found = self.repos[repo]
        return found.commits[found.branches.get(revision, revision)]

    def content(self, entry: Entry) -> bytes:
        """A file's bytes, from the commit or from storage."""
        if entry.content is not None:
            return entry.content
        return self.store[entry.oid] if entry.oid in self.store else self._from_xet(entry)

    def _from_xet(self, entry: Entry) -> bytes:
        import tempfile

        from hf_xet import XetFileInfo, XetSession  # type: ignore[import-untyped]

        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "file"
            url = f"{self.url}/api/models/x/y/xet-read-token/main"
            with XetSession().new_file_download_group(token_refresh_url=url, token_refresh_headers={}) as group:
                group.start_download_file(XetFileInfo(self.xet_hashes[entry.oid], entry.size), str(target))
            return target.read_bytes()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or every answer waits 40 ms for the client's system
    served: FakeHub
    answer_lost = False

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: Any = None, headers: Mapping[str, str] | None = None) -> None:
        if self.answer_lost:
            self.answer_lost, self.close_connection = False, True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        data = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self, limit: int | None = None) -> bytes:
        """The request's body, at the hub's rate; of one that is to be cut, its beginning."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        left = int(self.headers.get("Content-Length") or 0)
        left = left if limit is None else min(left, limit)
        pieces = []
        while left:
            piece = self.rfile.read(min(left, 1 << 16))
            if not piece:
                break
            left -= len(piece)
            pieces.append(piece)
            if self.command == "PUT":
                with self.served.lock:
                    self.served.arrived += len(piece)
                if self.served.rate:
                    time.sleep(len(piece) / self.served.rate)
        return b"".join(pieces)

    def _handle(self) -> None:
        hub = self.served
        path = unquote(urlsplit(self.path).path)
        with hub.lock:
            hub.seen[f"{self.command} {path}"] += 1
            if "Authorization" in self.headers:
                kept = hub.authorized_store if path.startswith("/store/") else hub.authorized
                kept.add(self.headers["Authorization"])
            fault = hub.fault_of(f"{self.command} {path}")
        if fault and fault.after:
            self.answer_lost = True
        elif fault:
            self._fail(fault)
            return
        for pattern, method in _ROUTES:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                wanted = match.groupdict()
                if method is not _Handler._store and method is not _Handler._token and not self._may(wanted):
                    return
                method(self, **wanted)
                return
        self._body()
        self._answer(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _fail(self, fault: Fault) -> None:
        if fault.cut_after is not None:
            self._body(fault.cut_after)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._body()
        self._answer(fault.status, {"error": fault.message or "told to fail"}, fault.headers)

    def _may(self, wanted: dict[str, str]) -> bool:
        """Whether the token is good and the repository and its revision are there; else the hub's own answers."""
        known = self.served.repos.get(wanted.get("repo", ""))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not (known and not known.private):
            self._body()
            self._answer(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
            return False
        if "repo" in wanted and known is None:
            self._body()
            self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return False
        revision = wanted.get("rev")
        if known and revision is not None and revision not in {*known.branches, *known.commits}:
            self._body()
            self._answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return False
        return True

    def _json(self) -> Any:
        return json.loads(self._body() or b"{}")

    def _whoami(self) -> None:
        self._answer(200, {"type": "user", "name": "me", "auth": {"type": "access_token"}})

    def _create(self) -> None:
        wanted = self._json()
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if repo in self.served.repos:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.served.url}/{repo}"})
            return
        self.served.add_repo(repo, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        self._answer(200, {"url": f"{self.served.url}/{repo}", "name": repo})

    def _validate(self) -> None:
        import yaml

        content = self._json()["content"]
        errors = []
        if match := re.match(r"---\n(.*?)\n---\n", content, re.DOTALL):
            found = yaml.safe_load(match[1])
            if not re.fullmatch(r"[a-z0-9.\-]+", str(found.get("license", "other"))):
                errors.append({"message": '"license" must be one of the hub\'s'})
            if found.get("base_model_relation", "merge") not in ("adapter", "finetune", "merge", "quantized"):
                errors.append({"message": '"base_model_relation" must be one of the hub\'s'})
            if "base_model" in found and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(found["base_model"])):
                errors.append({"message": '"base_model" with value is not valid'})
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _preupload(self, repo: str, rev: str) -> None:
        there = self.served.files(repo, rev)
        answers = []
        for file in self._json()["files"]:
            name, entry = file["path"], there.get(file["path"])
            mode = "lfs" if name.endswith(_LFS_SUFFIXES) or file["size"] > 2**20 else "regular"
            oid = None if entry is None else entry.oid if entry.content is None else git_hash(entry.content)
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, **({"oid": oid} if oid else {})})
        self._answer(200, {"files": answers})

    def _write_token(self, **_: str) -> None:
        self._token()

    def _token(self, **_: str) -> None:
        if self.served.xet is None:
            self._answer(404, {"error": "no xet storage here"})
            return
        found = {"accessToken": "xet-token", "exp": int(time.time()) + 3600, "casUrl": f"local://{self.served.xet}"}
        headers = {"X-Xet-Cas-Url": f"local://{self.served.xet}", "X-Xet-Access-Token": "xet-token"}
        self._answer(200, found, headers | {"X-Xet-Token-Expiration": str(found["exp"])})

    def _batch(self, **_: str) -> None:
        hub, objects = self.served, []
        for wanted in self._json()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            found: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in hub.store:
                href, header = f"{hub.url}/store/{oid}?X-Amz-Signature=signed", {}
                if hub.part_bytes and size > hub.part_bytes:
                    count = -(-size // hub.part_bytes)
                    header = {str(part): f"{hub.url}/store/{oid}/{part}" for part in range(1, count + 1)}
                    header["chunk_size"] = str(hub.part_bytes)
                    href = f"{hub.url}/store/{oid}/complete"
                found["actions"] = {"upload": {"href": href, "header": header}}
            objects.append(found)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _store(self, oid: str, part: str = "") -> None:
        data, hub = self._body(), self.served
        if self.command == "POST":
            data = b"".join(part for _, part in sorted(hub.parts.pop(oid).items()))
        elif part:
            hub.parts.setdefault(oid, {})[int(part)] = data
            self._answer(200, {}, {"ETag": f'"{part}"'})
            return
        if hashlib.sha256(data).hexdigest() != oid:
            self._answer(400, {"error": "the SHA-256 of what came is not what was said"})
            return
        hub.store[oid] = data
        self._answer(200)

    def _commit(self, repo: str, rev: str) -> None:
        hub = self.served
        lines = [json.loads(line) for line in self._body().splitlines()]
        files, header = dict(hub.files(repo, rev)), lines[0]["value"]
        parent = header.get("parentCommit")
        if parent and parent != hub.repos[repo].branches[rev]:
            self._answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Entry(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if hub.xet is None and value["oid"] not in hub.store:
                    self._answer(400, {"error": f"{value['path']} points to what was never uploaded"})
                    return
                files[value["path"]] = Entry(oid=value["oid"], size=value.get("size", 0))
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hub.repos[repo].commit(rev, files)
        self._answer(200, {"commitUrl": f"{hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})

    def _described(self, name: str, entry: Entry) -> dict[str, Any]:
        size = entry.size if entry.content is None else len(entry.content)
        found: dict[str, Any] = {"type": "file", "path": name, "size": size}
        if entry.content is None:
            oid = self.served.tamper(name, entry.oid)
            return {**found, "oid": "0" * 40, "lfs": {"oid": oid, "size": size, "pointerSize": 130}}
        return {**found, "oid": self.served.tamper(name, git_hash(entry.content))}

    def _paths(self, repo: str, rev: str) -> None:
        wanted = parse_qs(self._body().decode())["paths"]
        there = self.served.files(repo, rev)
        folders = [name for name in wanted if any(file.startswith(f"{name}/") for file in there)]
        found = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]
        self._answer(200, found + [self._described(name, there[name]) for name in wanted if name in there])

    def _tree(self, repo: str, rev: str, folder: str | None = None) -> None:
        there = self.served.files(repo, rev)
        if folder is None and "recursive=true" in self.path.lower():
            self._answer(200, [self._described(name, entry) for name, entry in there.items()])
            return
        inside = f"{folder}/" if folder else ""
        if folder and not any(name.startswith(inside) for name in there):
            self._answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
            return
        found: dict[str, Any] = {}
        for name, entry in there.items():
            first, _, deeper = name.removeprefix(inside).partition("/")
            if name.startswith(inside):
                folded = {"type": "directory", "path": inside + first, "oid": "0" * 40, "size": 0}
                found[first] = folded if deeper else self._described(name, entry)
        self._answer(200, list(found.values()))

    def _info(self, repo: str, rev: str = "main") -> None:
        found = self.served.repos[repo]
        oid = found.branches.get(rev, rev)
        siblings = [{"rfilename": name} for name in found.commits[oid]]
        self._answer(200, {"id": repo, "sha": oid, "private": found.private, "siblings": siblings, "tags": []})

    def _resolve(self, repo: str, rev: str, name: str) -> None:
        there = self.served.files(repo, rev)
        if name not in there:
            self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        entry = there[name]
        data = self.served.content(entry)
        found = self.served.repos[repo]
        etag = entry.oid if entry.content is None else git_hash(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": found.branches.get(rev, rev)}
        if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            begin, end = int(match[1]), min(int(match[2]) + 1, len(data))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            with self.served.lock:
                self.served.ranges.append((name, begin, end))
            self._answer(206, data[begin:end], headers)
            return
        self._answer(200, data, {**headers, "Content-Length": str(len(data))})


def git_hash(content: bytes) -> str:
    """The hash that git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324 - git's


_ROUTES: tuple[tuple[str, Callable[..., None]], ...] = (
    (r"GET /api/whoami-v2", _Handler._whoami),
    (r"POST /api/repos/create", _Handler._create),
    (r"POST /api/validate-yaml", _Handler._validate),
    (rf"POST /api/models/{_REPO}/preupload/(?P<rev>.+)", _Handler._preupload),
    (rf"GET /api/models/{_REPO}/xet-write-token/(?P<rev>.+)", _Handler._write_token),
    (rf"GET /api/models/{_REPO}/xet-read-token/(?P<rev>.+)", _Handler._token),
    (rf"POST /{_REPO}\.git/info/lfs/objects/batch", _Handler._batch),
    (r"PUT /store/(?P<oid>[0-9a-f]{64})", _Handler._store),
    (r"PUT /store/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", _Handler._store),
    (r"POST /store/(?P<oid>[0-9a-f]{64})/complete", _Handler._store),
    (rf"POST /api/models/{_REPO}/commit/(?P<rev>.+)", _Handler._commit),
    (rf"POST /api/models/{_REPO}/paths-info/(?P<rev>.+)", _Handler._paths),
    (rf"GET /api/models/{_REPO}/tree/(?P<rev>[^/]+)(?:/(?P<folder>.+))?", _Handler._tree),
    (rf"GET /api/models/{_REPO}", _Handler._info),
    (rf"GET /api/models/{_REPO}/revision/(?P<rev>.+)", _Handler._info),
    (rf"(?:GET|HEAD) /{_REPO}/resolve/(?P<rev>[^/]+)/(?P<name>.+)", _Handler._resolve),
)
