"""
A small OpenAI-compatible server whose replies the test determines.

    python tests/support/openai_server.py PORT LATENCY_SECONDS   # in its own process
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Reply:
    """A reply of the server: status, body and content type."""

    def __init__(
        self, body: Any, status: int = 200, content_type: str = "application/json", headers: dict | None = None
    ):
        self.body = body if isinstance(body, str) else json.dumps(body)
        self.status = status
        self.content_type = content_type
        self.headers = headers or {}


def completion(text: str | None, finish_reason: str = "stop", num_tokens: int | None = None, **message) -> Reply:
    """A chat completion with this text and, if given, its number of tokens."""
    message = {"role": "assistant", "content": text, **message}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    if num_tokens is not None:
        body["usage"] = {"prompt_tokens": 1, "total_tokens": 1 + num_tokens, "completion_tokens": num_tokens}
    return Reply(body)


def question_of(payload: dict) -> str:
    """The question in a request for a cue."""
    text = payload["messages"][-1]["content"][-1]["text"]
    return text.partition("Question:\n")[2].partition("\n")[0] or text


class OpenAIServer:
    """
    Serves chat completions on localhost.

    Args:
        reply (`Callable[[dict], Reply]`):
            Returns the reply to a request's payload. It may sleep to simulate latency.
    """

    def __init__(self, reply: Callable[[dict], Reply], port: int = 0):
        self.payloads: list[dict] = []
        self.headers: list[dict] = []
        self.running = self.most_running = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 2**16  # head and body in one packet, or the client's delayed ACK adds 40 ms

            def do_POST(self):
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.payloads.append(payload)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    server.running += 1
                    server.most_running = max(server.most_running, server.running)
                try:
                    answer = reply(payload)
                finally:
                    with lock:
                        server.running -= 1
                body = answer.body.encode()
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.content_type)
                self.send_header("Content-Length", str(len(body)))
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

            def handle(self):
                try:
                    super().handle()
                except ConnectionError:  # the client timed out, which tests provoke
                    pass

        ThreadingHTTPServer.request_queue_size = 128
        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "OpenAIServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()


def main() -> None:
    port, latency = int(sys.argv[1]), float(sys.argv[2])

    def reply(payload: dict) -> Reply:
        time.sleep(latency)
        return completion(f"the evidence for {question_of(payload)}")

    with OpenAIServer(reply, port) as server:
        print(server.base_url, flush=True)
        sys.stdin.read()  # until the parent closes it


if __name__ == "__main__":
    main()
