"""A Hugging Face Hub on loopback, as far as adapters need one, and a process with the unmodified client that talks to it.

It keeps repositories with commits and branches, private ones behind a token, writes every request down, and can be told to
fail. Every upload is `regular`: the client then sends the bytes in the commit itself, and needs neither LFS nor Xet.
"""

import base64
import hashlib
import json
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"


def blob(data):
    """The id that git gives a file, by which the client tells whether it has it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)  # commit -> {path: bytes}
    refs: dict = field(default_factory=dict)  # branch or tag -> commit

    def commit(self, files, branch="main"):
        name = hashlib.sha1(repr((branch, len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[name] = files
        self.refs[branch] = name
        return name

    def find(self, revision):
        """The commit that a branch, tag or commit means, or None."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """What the tests hold: repositories, the requests made so far, and faults to inject."""

    def __init__(self):
        self.repositories = {}
        self.requests = []  # (method, path, token)
        self.faults = {}  # end of a path -> "cut", "cut once", "short", "corrupt", or an HTTP status

    @contextmanager
    def serve(self):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def files(self, repository, revision="main"):
        repo = self.repositories[repository]
        return repo.commits[repo.find(revision)]

    def seen(self, method):
        """Paths asked for with `method`."""
        return [path for how, path, _ in self.requests if how == method]


class Problem(Exception):
    """An answer that the client turns into one of its exceptions."""

    def __init__(self, status, code="", message="no", commit=None):
        super().__init__(message)
        self.status, self.code, self.commit = status, code, commit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        """The requests are in `Hub.requests`."""

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_GET

    def answer(self):
        url = urlsplit(self.path)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append((self.command, unquote(url.path), self.token))
        try:
            for pattern, act in ROUTES:
                if match := re.fullmatch(pattern, url.path):
                    parts = {name: unquote(part) for name, part in match.groupdict().items() if part is not None}
                    return act(self, parse_qs(url.query), **parts)
            raise Problem(404, message=f"no such endpoint: {self.command} {url.path}")
        except Problem as problem:
            headers = {"X-Error-Code": problem.code} if problem.code else {}
            headers |= {"X-Repo-Commit": problem.commit} if problem.commit else {}
            self.send(problem.status, json.dumps({"error": str(problem)}).encode(), headers)

    def send(self, status, data, headers=None):
        self.send_response(status)
        for name, value in (
            {"Content-Length": str(len(data)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def say(self, data):
        self.send(200, json.dumps(data).encode())

    def repository(self, name, write=False):
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.token != TOKEN):
            raise Problem(404 if self.token == TOKEN else 401, "RepoNotFound", "Repository not found")
        if found.gated:
            raise Problem(403, "GatedRepo", "Access is restricted")
        if write and self.token != TOKEN:
            raise Problem(403, message="You need a token that may write")
        return found

    def commit_of(self, found, revision):
        commit = found.find(revision)
        if commit is None:
            raise Problem(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def create(self, query):
        asked = json.loads(self.body)
        name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
        if self.token != TOKEN:
            raise Problem(401, message="Invalid username or password.")
        if name in self.hub.repositories:
            return self.send(
                409,
                json.dumps({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}).encode(),
            )
        made = self.hub.repositories[name] = Repository(
            bool(asked.get("private") or asked.get("visibility") == "private")
        )
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.say({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def info(self, query, repo, revision="main"):
        found = self.repository(repo)
        commit = self.commit_of(found, revision)
        files = [{"rfilename": path} for path in found.commits[commit]]
        self.say({"id": repo, "modelId": repo, "sha": commit, "private": found.private, "siblings": files, "tags": []})

    def tree(self, query, repo, revision, folder=""):
        found = self.repository(repo)
        files = found.commits[self.commit_of(found, revision)]
        self.say(
            [
                {"type": "file", "path": p, "size": len(d), "oid": blob(d)}
                for p, d in files.items()
                if p.startswith(folder)
            ]
        )

    def preupload(self, query, repo, revision):
        found = self.repository(repo, write=True)
        there = found.commits[self.commit_of(found, revision)]
        modes = [
            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
            | ({"oid": blob(there[f["path"]])} if f["path"] in there else {})
            for f in json.loads(self.body)["files"]
        ]
        self.say({"files": modes})

    def commit(self, query, repo, revision):
        found = self.repository(repo, write=True)
        parent = self.commit_of(found, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, parent):
            raise Problem(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(found.commits[parent])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        request = "create_pr" in query
        branch = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in found.refs)}" if request else revision
        made = found.commit(files, branch)
        answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/{made}", "commitOid": made, "success": True}
        self.say(answer | ({"pullRequestUrl": f"{self.hub.url}/{repo}/discussions/1"} if request else {}))

    def resolve(self, query, repo, revision, path):
        found = self.repository(repo)
        commit = self.commit_of(found, revision)
        if path not in found.commits[commit]:
            raise Problem(404, "EntryNotFound", "Entry not found", commit)
        whole = found.commits[commit][path]
        headers = {"ETag": f'"{blob(whole)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        key, fault = next(((end, what) for end, what in self.hub.faults.items() if path.endswith(end)), (None, None))
        if isinstance(fault, int):
            raise Problem(fault, message="the Hub is not well")
        if self.command == "HEAD" or fault is None:
            start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range") or "") or [0, 0])[1])
            part = {"Content-Range": f"bytes {start}-{len(whole) - 1}/{len(whole)}"} if start else {}
            return self.send(206 if start else 200, whole[start:], headers | part)
        if fault == "corrupt":
            return self.send(200, whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], headers)
        if fault == "short":
            return self.send(200, whole[: len(whole) // 2], headers)
        if fault == "cut once":
            del self.hub.faults[key]
        self.send(200, whole[: len(whole) // 2], headers | {"Content-Length": str(len(whole))})
        self.close_connection = True
        return None


REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES = (
    (r"/api/whoami-v2", lambda self, query: self.say({"name": "user", "type": "user", "orgs": []})),
    (r"/api/validate-yaml", lambda self, query: self.say({"errors": [], "warnings": []})),
    (r"/api/repos/create", Handler.create),
    (rf"/api/models/{REPO}", Handler.info),
    (rf"/api/models/{REPO}/revision/(?P<revision>[^/]+)", Handler.info),
    (rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", Handler.tree),
    (rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", Handler.commit),
    (rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
)


@contextmanager
def client(url, home, **environment):
    """A fresh process whose huggingface_hub, read at import, knows this Hub: `run(function, ...)` runs a function there."""
    settings = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"} | environment
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _set, (settings,))
    try:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result(timeout=300)
    finally:
        pool.shutdown(cancel_futures=True)


def _set(settings):
    os.environ.update(settings)
