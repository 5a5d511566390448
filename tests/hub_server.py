"""A stand-in for the hubs: the routes, headers and answers of Hugging Face, Kaggle and ModelScope, from folders on disk.

The real libraries talk to it over HTTP. It records what was asked for, and gives errors on demand.
"""

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
LARGE = (".safetensors", ".h5", ".gguf", ".bin", ".ckpt", "tokenizer.model")  # those that git LFS stores, and the CDN serves


class Hub:
    """What the stand-in serves.

    models: name -> folder; a Hugging Face name may carry "@revision", a Kaggle name ends in its version.
    errors: substring of a request -> (status, headers, body); the first that matches is answered.
    asked: names of the files whose content was downloaded.
    requests: every request's path.
    """

    def __init__(self, url):
        self.url, self.models, self.errors, self.asked, self.requests = url, {}, {}, [], []

    def files(self, folder):
        return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        return

    def do_HEAD(self):
        self._answer(None)

    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body):
        hub, parts = self.server.hub, urlsplit(self.path)
        request = self.path + (json.dumps(body) if body else "")
        hub.requests.append(request)
        for mark, (status, headers, text) in hub.errors.items():
            if mark in request:
                return self._send(status, text.encode(), headers)
        path, query = parts.path.strip("/"), {key: values[0] for key, values in parse_qs(parts.query).items()}
        if path.startswith("api/v1/models.ModelApiService/"):
            return self._kaggle(path.rsplit("/", 1)[1], body)
        if path.startswith("api/v1/models/"):
            return self._modelscope(path.removeprefix("api/v1/models/").split("/", 2), query)
        if path.startswith("api/models/"):
            return self._hugging_face_api([unquote(part) for part in path.removeprefix("api/models/").split("/")])
        if path.startswith("content/"):
            return self._content(*map(unquote, parts.path.removeprefix("/content/").split("/", 1)))
        owner, name, kind, revision, *file = [*path.split("/"), "", "", ""]
        if kind != "resolve":  # huggingface_hub asks for a list of coding agents
            return self._send(404, b"")
        return self._resolve(f"{owner}/{name}", unquote(revision), unquote("/".join(filter(None, file))))

    # Hugging Face ---------------------------------------------------------------------------------------------------

    def _revision(self, model, revision):
        """The served name of a revision, and its commit; None if there is none."""
        served = self.server.hub.models
        if revision in ("main", COMMIT) and model in served:
            return model, COMMIT
        name = next(
            (name for name in served if name.startswith(f"{model}@") and revision in (name.partition("@")[2], OTHER_COMMIT)), None
        )
        return None if name is None else (name, OTHER_COMMIT)

    def _find(self, model, revision):
        if not any(name.partition("@")[0] == model for name in self.server.hub.models):
            # Hugging Face tells nobody whether a repository is missing or private.
            self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return None
        found = self._revision(model, revision)
        if found is None:
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        return found

    def _hugging_face_api(self, parts):
        model, kind, revision = "/".join(parts[:2]), *(parts[2:] or ["revision", "main"])
        found = self._find(model, revision)
        if found is None:
            return None
        folder = self.server.hub.models[found[0]]
        names = self.server.hub.files(folder)
        if kind == "tree":
            files = [self._entry(Path(folder) / name, name) for name in names]
            return self._send_json(files)
        return self._send_json({"id": model, "modelId": model, "sha": found[1], "siblings": [{"rfilename": n} for n in names]})

    def _entry(self, path, name):
        data = path.read_bytes()
        entry = {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _resolve(self, model, revision, file):
        found = self._find(model, revision)
        if found is None:
            return None
        path = Path(self.server.hub.models[found[0]]) / file
        headers = {"X-Repo-Commit": found[1]}
        if not path.is_file():
            return self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        data = path.read_bytes()
        if file.endswith(LARGE):
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"'}
            return self._send(302, b"", {**headers, "Location": self._content_url(found[0], file)})
        return self._content(found[0], file, {**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    # Kaggle ---------------------------------------------------------------------------------------------------------

    def _kaggle(self, call, body):
        handle = "/".join([body["ownerSlug"], body["modelSlug"], _framework(body["framework"]), body["instanceSlug"]])
        served = self.server.hub.models
        versions = [int(name.rsplit("/", 1)[1]) for name in served if name.startswith(f"{handle}/")]
        name = f"{handle}/{body.get('versionNumber') or max(versions, default=0)}"
        if name not in served:
            return self._send_json({"code": 404, "message": "Model instance not found"}, 404)
        if call == "GetModelInstance":
            return self._send_json({"id": 1, "versionNumber": max(versions)})
        if call == "ListModelInstanceVersionFiles":
            return self._send_json({"files": [{"name": file} for file in self.server.hub.files(served[name])], "nextPageToken": ""})
        if not (Path(served[name]) / body["path"]).is_file():
            return self._send_json({"code": 404, "message": "File not found"}, 404)
        return self._send(302, b"", {"Location": self._content_url(name, body["path"])})

    # ModelScope -----------------------------------------------------------------------------------------------------

    def _modelscope(self, parts, query):
        model, rest = "/".join(parts[:2]), parts[2] if len(parts) > 2 else ""
        revision = query.get("Revision") or "master"
        name = model if revision == "master" else f"{model}@{revision}"
        if name not in self.server.hub.models:
            return self._send_json({"Code": 10010205001, "Success": False, "Message": "record not found"}, 404)
        folder = self.server.hub.models[name]
        if rest == "repo/files":
            files = [self._modelscope_entry(Path(folder) / file, file) for file in self.server.hub.files(folder)]
            return self._send_json({"Code": 200, "Success": True, "Data": {"Files": files}})
        if rest == "repo":
            return self._content(name, query["FilePath"])
        return self._send_json({"Code": 200, "Success": True, "Data": {"Id": 1, "Name": model}})

    def _modelscope_entry(self, path, name):
        data = path.read_bytes()
        return {"Path": name, "Name": path.name, "Type": "blob", "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest()}

    # All ------------------------------------------------------------------------------------------------------------

    def _content_url(self, model, name):
        """Another host than the hub's, as a CDN is."""
        return f"{self.server.hub.url.replace('127.0.0.1', 'localhost')}/content/{quote(model, safe='')}/{quote(name)}"

    def _content(self, model, name, headers=()):
        data = (Path(self.server.hub.models[model]) / name).read_bytes()
        if self.command == "GET":
            self.server.hub.asked.append(name)
        self._send(200, data, {"Content-Type": "application/octet-stream", **dict(headers)})

    def _send_json(self, values, status=200):
        self._send(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _send(self, status, data, headers=()):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reader had enough
                self.wfile.write(data)


def _framework(value):
    """`MODEL_FRAMEWORK_PY_TORCH` or `pyTorch` -> `pytorch`."""
    return value.removeprefix("MODEL_FRAMEWORK_").replace("_", "").lower()


@contextlib.contextmanager
def running_hub():
    """Serves on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
