"""A small Hub on localhost: the parts of its HTTP API that create, upload to and download from a model repository."""

import base64
import fnmatch
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


COMMIT = "0" * 40


def is_ignored(path: str, gitignore: str) -> bool:
    """Whether `.gitignore` excludes a file from an upload. Lines are names of files, or of folders with a slash."""
    parts = path.split("/")
    return any(
        any(fnmatch.fnmatch(part, line.rstrip("/")) for part in (parts[:-1] if line.endswith("/") else parts))
        for line in gitignore.splitlines()
        if line
    )


class HubHandler(BaseHTTPRequestHandler):
    """The routes. Requests for models read and write the `repos` of `self.server.hub`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            self.create_repo()
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            self.say_how_to_upload(match[1])
        elif path.endswith("/info/lfs/objects/batch"):
            self.say_where_to_put_large_files()
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self.commit(match[1])
        else:
            self.reply({"error": f"unknown route: {path}"}, status=404)

    def create_repo(self):
        repo = json.loads(self.body)
        repo_id = f"{repo['organization'] or 'me'}/{repo['name']}"
        self.server.hub.repos.setdefault(repo_id, {})
        self.reply({"url": f"{self.server.hub.url}/{repo_id}"})

    def say_how_to_upload(self, repo_id: str):
        payload = json.loads(self.body)
        gitignore = payload.get("gitIgnore", self.server.hub.repos[repo_id].get(".gitignore", b"").decode())
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".bin", ".pt")) else "regular",
                "shouldIgnore": is_ignored(file["path"], gitignore),
            }
            for file in payload["files"]
        ]
        self.reply({"files": files})

    def say_where_to_put_large_files(self):
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.hub.url}/large/{each['oid']}"}}}
            for each in json.loads(self.body)["objects"]
        ]
        self.reply({"transfer": "basic", "objects": objects})

    def commit(self, repo_id: str):
        hub = self.server.hub
        for item in map(json.loads, self.body.splitlines()):
            value = item["value"]
            if item["key"] == "header":
                hub.commits.append(value["summary"])
            elif item["key"] == "file":
                hub.repos[repo_id][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                hub.repos[repo_id][value["path"]] = hub.large_files[value["oid"]]
        self.reply({"commitUrl": f"{hub.url}/{repo_id}/commit/{COMMIT}", "commitOid": COMMIT})

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.hub.large_files[self.path.rpartition("/")[2]] = content
        self.reply({})

    def do_GET(self):
        repos = self.server.hub.repos
        path = self.path.partition("?")[0]
        file = re.fullmatch(r"(?:/api/resolve-cache/models)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path)
        if file and file[2] in repos.get(file[1], {}):
            content = repos[file[1]][file[2]]
            self.reply(content, headers={"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
        elif info and info[1] in repos:
            siblings = [{"rfilename": name} for name in repos[info[1]]]
            self.reply({"id": info[1], "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})
        else:
            self.reply({"error": path}, status=404, headers={"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def reply(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


class HubServer:
    """
    Serves repositories of files.

    Args:
        repos (`dict[str, dict[str, bytes]]`, *optional*):
            Contents of the files by id of the model and path.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]] | None = None):
        self.repos = repos or {}
        self.commits: list[str] = []
        self.large_files: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
