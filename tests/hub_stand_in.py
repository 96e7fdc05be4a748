"""A Hub of one process: the part of the HTTP API that huggingface_hub speaks when it uploads and downloads models.

    with HubStandIn() as hub:
        hub.add_token("secret", user="ada")
        ...  # with HF_ENDPOINT=hub.url and HF_HUB_DISABLE_XET=1
        hub.repositories["ada/model"].files()

Large files (`hub.lfs_from` bytes or more) go by LFS, in parts of `hub.part_size` bytes, if that is set.
`hub.expires_at` is a pattern of the paths of requests at which all tokens expire, `hub.breaks_at` one of those in the
midst of whose bodies the connection drops, `hub.fails_at` one of those which the Hub itself fails to answer.
"""

import base64
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

Files = dict[str, bytes]


@dataclass
class Commit:
    """All files of a repository after a commit."""

    files: Files
    title: str
    is_lfs: set[str] = field(default_factory=set)

    @property
    def oid(self) -> str:
        content = [(path, hashlib.sha1(data).hexdigest()) for path, data in sorted(self.files.items())]
        return hashlib.sha1(repr((self.title, content)).encode()).hexdigest()


class Repository:
    """Branches, each a list of commits, and the large files that have arrived, committed or not."""

    def __init__(self, private: bool) -> None:
        self.private = private
        self.branches = {"main": [Commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")]}
        self.large_files: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}

    def files(self, branch: str = "main") -> Files:
        return self.branches[branch][-1].files

    def find(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        return next(
            (commit for commits in self.branches.values() for commit in commits if commit.oid == revision), None
        )


class HubStandIn:
    def __init__(self) -> None:
        self.users: dict[str, str] = {}
        self.readers: set[str] = set()
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.lfs_from = 10_000
        self.part_size: int | None = None
        self.expires_at: str | None = None
        self.breaks_at: str | None = None
        self.fails_at: str | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def add_token(self, token: str, user: str, may_write: bool = True) -> None:
        self.users[token] = user
        if not may_write:
            self.readers.add(token)

    def __enter__(self) -> "HubStandIn":
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class RefusalError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{method} {path}")
        if self.hub.expires_at is not None and re.search(self.hub.expires_at, path):
            self.hub.users.clear()
        if self.hub.breaks_at is not None and re.search(self.hub.breaks_at, path):
            self.rfile.read(100)
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        try:
            if self.hub.fails_at is not None and re.search(self.hub.fails_at, path):
                self._body()
                raise RefusalError(500, "Internal Error")
            if method == "PUT":
                return self._store(path)
            body = self._body()
            for route, handle in ROUTES:
                match = re.fullmatch(route, f"{method} {path}")
                if match:
                    return handle(self, body, *map(unquote, match.groups()))
            raise RefusalError(404, f"there is no {method} {path} here")
        except RefusalError as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            self._send_json({"error": str(error)}, error.status, headers)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while length := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(length))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.hub.users:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return self.hub.users[token]

    def _writer(self, owner: str | None = None) -> str:
        user = self._user()
        if user is None:
            raise RefusalError(401, "Invalid username or password.")
        token = self.headers["Authorization"].removeprefix("Bearer ")
        if token in self.hub.readers or owner not in (None, user):
            raise RefusalError(403, f"you may not write to {owner or user}")
        return user

    def _repository(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self._user() != repo_id.partition("/")[0]):
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        return repository

    def _commit_of(self, repo_id: str, revision: str) -> Commit:
        commit = self._repository(repo_id).find(revision)
        if commit is None:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def who(self, _: bytes) -> None:
        self._send_json({"type": "user", "name": self._writer(), "orgs": []})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        user = self._writer(wanted.get("organization"))
        repo_id = f"{wanted.get('organization') or user}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            return self._send_json({"error": "You already created this model repo", **answer}, 409)
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repositories[repo_id] = Repository(bool(private))
        return self._send_json(answer)

    def validate_yaml(self, body: bytes) -> None:
        errors = metadata_errors(json.loads(body)["content"])
        self._send_json({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)

    def info(self, _: bytes, repo_id: str, revision: str | None = None) -> None:
        repository, commit = self._repository(repo_id), self._commit_of(repo_id, revision or "main")
        siblings = [{"rfilename": path} for path in commit.files]
        self._send_json({"id": repo_id, "sha": commit.oid, "private": repository.private, "siblings": siblings})

    def branch(self, _: bytes, repo_id: str, branch: str) -> None:
        self._writer(repo_id.partition("/")[0])
        repository = self._repository(repo_id)
        if branch in repository.branches:
            raise RefusalError(409, "Reference already exists")
        repository.branches[branch] = list(repository.branches["main"])
        self._send_json({})

    def tree(self, _: bytes, repo_id: str, revision: str) -> None:
        files = self._commit_of(repo_id, revision).files
        self._send_json(
            [{"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)} for path, data in files.items()]
        )

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        self._writer(repo_id.partition("/")[0])
        commit = self._commit_of(repo_id, revision)
        answers = []
        for file in json.loads(body)["files"]:
            is_lfs = file["size"] >= self.hub.lfs_from or file["path"].endswith(".safetensors")
            answer = {"path": file["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False}
            if file["path"] in commit.files:
                data = commit.files[file["path"]]
                answer["oid"] = hashlib.sha256(data).hexdigest() if is_lfs else _git_oid(data)
            answers.append(answer)
        self._send_json({"files": answers})

    def batch(self, body: bytes, repo_id: str) -> None:
        self._writer(repo_id.partition("/")[0])
        repository, objects = self._repository(repo_id), []
        for wanted in json.loads(body)["objects"]:
            place = f"{self.hub.url}/lfs/{repo_id}/{wanted['oid']}"
            answer: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repository.large_files:
                upload: dict[str, Any] = {"href": place}
                if self.hub.part_size is not None:
                    count = -(-wanted["size"] // self.hub.part_size)
                    parts = {str(number): f"{place}/{number}" for number in range(1, count + 1)}
                    upload = {"href": f"{place}/complete", "header": {"chunk_size": str(self.hub.part_size), **parts}}
                answer["actions"] = {"upload": upload}
            objects.append(answer)
        self._send_json({"transfer": "basic", "objects": objects})

    def _store(self, path: str) -> None:
        match = re.fullmatch(r"/lfs/([^/]+/[^/]+)/([0-9a-f]{64})(?:/(\d+))?", path)
        if not match:
            raise RefusalError(404, f"nothing is stored at {path}")
        repository, oid, part = self.hub.repositories[match[1]], match[2], match[3]
        data = self._body()
        if part is not None:
            repository.parts[oid, int(part)] = data
        else:
            self._finish(repository, oid, data)
        return self._send(b"", headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    def complete(self, body: bytes, repo_id: str, oid: str) -> None:
        repository = self.hub.repositories[repo_id]
        data = [repository.parts[oid, part["partNumber"]] for part in json.loads(body)["parts"]]
        self._finish(repository, oid, b"".join(data))
        self._send_json({})

    def _finish(self, repository: Repository, oid: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != oid:
            raise RefusalError(400, "the content does not have this hash")
        repository.large_files[oid] = data

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        self._writer(repo_id.partition("/")[0])
        repository = self._repository(repo_id)
        before = self._commit_of(repo_id, revision)
        files, is_lfs, title = dict(before.files), set(before.is_lfs), ""
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in repository.large_files:
                files[value["path"]] = repository.large_files[value["oid"]]
                is_lfs.add(value["path"])
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise RefusalError(400, f"cannot be committed: {key} {value.get('path')}")
        repository.branches[revision].append(Commit(files, title, is_lfs & files.keys()))
        oid = repository.branches[revision][-1].oid
        self._send_json({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def resolve(self, _: bytes, repo_id: str, revision: str, path: str) -> None:
        commit = self._commit_of(repo_id, revision)
        if path not in commit.files:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        data = commit.files[path]
        etag = hashlib.sha256(data).hexdigest() if path in commit.is_lfs else _git_oid(data)
        self._send(data, headers={"ETag": f'"{etag}"', "X-Repo-Commit": commit.oid})


ROUTES = (
    (r"GET /api/whoami-v2", _Handler.who),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (r"GET /api/models/([^/]+/[^/]+)", _Handler.info),
    (r"GET /api/models/([^/]+/[^/]+)/revision/([^/]+)", _Handler.info),
    (r"POST /api/models/([^/]+/[^/]+)/branch/([^/]+)", _Handler.branch),
    (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)", _Handler.tree),
    (r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)", _Handler.preupload),
    (r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)", _Handler.commit),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    (r"POST /lfs/([^/]+/[^/]+)/([0-9a-f]{64})/complete", _Handler.complete),
    (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler.resolve),
)


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def metadata_errors(content: str) -> list[str]:
    """What is wrong with the metadata of a model card, by the Hub's rules for the fields that cards here have."""
    match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    if not isinstance(data, dict):
        return ["there is no metadata"]
    errors = []
    name = r"([\w.-]+/)?[\w.-]{1,96}"
    for key, pattern in (("license", r"[a-z0-9.-]+"), ("pipeline_tag", r"[a-z-]+"), ("library_name", r"[\w-]+")):
        if key in data and not (isinstance(data[key], str) and re.fullmatch(pattern, data[key])):
            errors.append(f'"{key}" must be an identifier')
    for key in ("base_model", "datasets", "tags"):
        values = data.get(key, [])
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list) or not all(isinstance(v, str) and re.fullmatch(name, v) for v in values):
            errors.append(f'"{key}" must be a name or names on the Hub')
    for entry in data.get("model-index", []):
        for result in entry["results"]:
            if not entry.get("name") or not result["task"].get("type") or not result["dataset"].get("type"):
                errors.append('"model-index" lacks a name, a type of task or a data set')
            for metric in result["metrics"]:
                if not metric.get("type") or not isinstance(metric.get("value"), int | float):
                    errors.append('"model-index" has a metric without type or value')
    return errors


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A stand-in that huggingface_hub and transformers take for the Hub in this process, logged in as ada."""
    with HubStandIn() as stand_in:
        stand_in.add_token("ada's", user="ada")
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        template = f"{stand_in.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", "ada's")
        yield stand_in
