"""A small Hub on localhost: as much of its HTTP API as creating, uploading to and downloading from a model needs."""

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
    """Whether the Hub leaves a file out because of the `.gitignore`: names of files, and of folders with a slash."""
    parts = path.split("/")
    return any(
        any(fnmatch.fnmatch(part, line.rstrip("/")) for part in (parts[:-1] if line.endswith("/") else parts))
        for line in gitignore.splitlines()
        if line
    )


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
        large_files: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                path = self.path.partition("?")[0]
                if path == "/api/repos/create":
                    repo = json.loads(body)
                    repo_id = f"{repo['organization'] or 'me'}/{repo['name']}"
                    hub.repos.setdefault(repo_id, {})
                    self.reply({"url": f"{hub.url}/{repo_id}"})
                elif path == "/api/validate-yaml":
                    self.reply({"errors": [], "warnings": []})
                elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
                    payload = json.loads(body)
                    hosted = hub.repos[match[1]].get(".gitignore", b"").decode()
                    gitignore = payload.get("gitIgnore", hosted)
                    files = [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs"
                            if file["path"].endswith((".safetensors", ".bin", ".pt"))
                            else "regular",
                            "shouldIgnore": is_ignored(file["path"], gitignore),
                        }
                        for file in payload["files"]
                    ]
                    self.reply({"files": files})
                elif path.endswith("/info/lfs/objects/batch"):
                    objects = [
                        {**each, "actions": {"upload": {"href": f"{hub.url}/large/{each['oid']}"}}}
                        for each in json.loads(body)["objects"]
                    ]
                    self.reply({"transfer": "basic", "objects": objects})
                elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
                    for item in map(json.loads, body.splitlines()):
                        value = item["value"]
                        if item["key"] == "header":
                            hub.commits.append(value["summary"])
                        elif item["key"] == "file":
                            hub.repos[match[1]][value["path"]] = base64.b64decode(value["content"])
                        elif item["key"] == "lfsFile":
                            hub.repos[match[1]][value["path"]] = large_files[value["oid"]]
                    self.reply({"commitUrl": f"{hub.url}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT})
                else:
                    self.reply({"error": f"no such route: {path}"}, status=404)

            def do_PUT(self):
                large_files[self.path.rpartition("/")[2]] = self.rfile.read(int(self.headers["Content-Length"]))
                self.reply({})

            def do_GET(self):
                path = self.path.partition("?")[0]
                resolved = re.fullmatch(r"(?:/api/resolve-cache/models)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
                if resolved and resolved[2] in hub.repos.get(resolved[1], {}):
                    content = hub.repos[resolved[1]][resolved[2]]
                    self.reply(content, headers={"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})
                elif (info := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path)) and (
                    info[1] in hub.repos
                ):
                    siblings = [{"rfilename": name} for name in hub.repos[info[1]]]
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

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
