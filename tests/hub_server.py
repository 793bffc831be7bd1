"""A Hugging Face hub with dataset repositories: the routes that its client takes, over HTTP on this machine."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Repository:
    """Commits, the oldest first: name of a commit, and the files that it has."""

    def __init__(self, private):
        self.private = private
        self.commits = []
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, ())

    def commit(self, added, removed):
        files = {**(self.commits[-1][1] if self.commits else {}), **added}
        files = {name: data for name, data in files.items() if name not in removed}
        name = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits.append((name, files))
        return name

    def at(self, revision):
        """Return a commit and its files; None where there is none."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class Hub(ThreadingHTTPServer):
    """Settings that a test changes, and what came.

    tokens: who may write; `refusal`: (path, status) answered where a request's path matches the pattern;
    damage: alters what is sent of a file; requests: method and path of all that came.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.objects, self.requests, self.cards = {}, {}, [], []
        self.tokens, self.refusal = {"hf_writer": True, "hf_reader": False}, None
        self.damage = lambda name, data: data
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _any(self):
        size = int(self.headers.get("Content-Length") or 0)
        body, url = self.rfile.read(size), urlsplit(self.path)
        with self.server.lock:
            self.server.requests.append((self.command, url.path))
            refusal = self.server.refusal
            if refusal and re.search(refusal[0], url.path):
                return self._send(refusal[1], b"<html>refused</html>")
            return self._route(unquote(url.path), parse_qs(url.query), body)

    do_GET = do_HEAD = do_POST = do_PUT = _any

    def _route(self, path, query, body):
        hub, token = self.server, (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in hub.tokens:
            return self._error(401, "", "Invalid credentials in Authorization header")
        may_write = hub.tokens.get(token, False)
        if path == "/api/validate-yaml":
            hub.cards.append(json.loads(body)["content"])
            return self._json({"warnings": [], "errors": []})
        if match := re.fullmatch(r"/objects/([0-9a-f]{64})", path):
            if self.command == "PUT":
                if hashlib.sha256(body).hexdigest() != match[1]:
                    return self._send(400, b"other content")
                hub.objects[match[1]] = body
                return self._send(200, b"")
            return self._send(200, hub.damage(query["name"][0], hub.objects[match[1]]))
        if path == "/api/repos/create":
            return self._create(json.loads(body), token, may_write)
        for pattern, method, writes in (
            (r"/api/datasets/([^/]+/[^/]+)", self._info, False),
            (r"/api/datasets/([^/]+/[^/]+)/revision/(.+)", self._info, False),
            (r"/api/datasets/([^/]+/[^/]+)/preupload/main", self._preupload, True),
            (r"/api/datasets/([^/]+/[^/]+)/commit/main", self._commit, True),
            (r"/datasets/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch, True),
            (r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve, False),
        ):
            if match := re.fullmatch(pattern, path):
                repository = hub.repositories.get(match[1])
                if repository is None or (repository.private and not token):
                    return self._error(404 if token else 401, "RepoNotFound", "Repository not found")
                if writes and not may_write:
                    return self._error(403, "", "You don't have the rights")
                return method(repository, body, *match.groups())
        return self._error(404, "", f"no such route: {path}")

    def _create(self, wanted, token, may_write):
        if not token:
            return self._error(401, "", "Invalid username or password.")
        if not may_write:
            return self._error(403, "", "You don't have the rights")
        assert wanted["type"] == "dataset"
        name = f"{wanted['organization']}/{wanted['name']}"
        known = name in self.server.repositories
        if not known:
            self.server.repositories[name] = Repository(wanted.get("visibility") == "private")
        return self._json({"url": f"{self.server.url}/datasets/{name}"}, 409 if known else 200)

    def _info(self, repository, body, name, revision="main"):
        commit = repository.at(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        files = [{"rfilename": item, "size": len(self._data(data))} for item, data in commit[1].items()]
        return self._json({"id": name, "sha": commit[0], "private": repository.private, "siblings": files})

    def _data(self, stored):
        return self.server.objects[stored] if isinstance(stored, str) else stored

    def _preupload(self, repository, body, name):
        answers = []
        for item in json.loads(body)["files"]:
            large = item["path"].endswith((".safetensors", ".faiss")) or item["size"] > 10_000
            mode = "lfs" if large else "regular"
            answers.append({"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
        return self._json({"files": answers})

    def _batch(self, repository, body, name):
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.server.url}/objects/{item['oid']}"}}
            known = item["oid"] in self.server.objects
            objects.append(item if known else {**item, "actions": upload})
        return self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repository, body, name):
        added, removed = {}, []
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value["parentCommit"] != repository.commits[-1][0]:
                return self._error(412, "", "A commit has happened since")
            if item["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            if item["key"] == "lfsFile":
                assert value["oid"] in self.server.objects
                added[value["path"]] = value["oid"]
            if item["key"] == "deletedFile":
                removed.append(value["path"])
        oid = repository.commit(added, removed)
        return self._json({"commitUrl": f"{self.server.url}/datasets/{name}/commit/{oid}", "commitOid": oid})

    def _resolve(self, repository, body, name, revision, file):
        commit = repository.at(revision)
        if commit is None or file not in commit[1]:
            return self._error(404, "EntryNotFound", "Entry not found")
        stored = commit[1][file]
        data = self._data(stored)
        headers = {"X-Repo-Commit": commit[0], "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if isinstance(stored, str):  # large files lie elsewhere
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{stored}"'}
            elsewhere = self.server.url.replace("127.0.0.1", "localhost")  # on another host, as on the hub
            headers |= {"Location": f"{elsewhere}/objects/{stored}?name={file}"}
            return self._send(302, b"", headers)
        return self._send(200, self.server.damage(file, data), headers)

    def _json(self, value, status=200):
        return self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status, code, message):
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        return self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status, data, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@contextmanager
def serving():
    """Serve an empty hub while the block runs."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
