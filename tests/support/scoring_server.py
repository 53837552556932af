"""
A small server with the part of vLLM's API that [`TeacherServer`] uses, computed by a transformers model.

vllm_plugin/test_served_teacher.py tests that vLLM's own server gives the same answers.
"""

import base64
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

import torch
from PIL import Image


Answer = tuple[int, Any]


class ScoringServer:
    """
    Context manager that serves a tiny Qwen-VL model on localhost.

    Args:
        model (`torch.nn.Module`):
            The model.
        processor ([`~transformers.ProcessorMixin`]):
            Its processor.
        name (`str`, *optional*, defaults to `"me/teacher"`):
            Name under which it is served.
        max_model_len (`int`, *optional*, defaults to `2048`):
            Maximum number of tokens in a request.
        max_logprobs (`int`, *optional*, defaults to `20`):
            Maximum number of log-probabilities for each token.
        tamper (`Callable[[str, Answer], Answer]`, *optional*):
            Modifies the answers: receives the path, and the status with the body.
        port (`int`, *optional*):
            Port to listen on; by default any free one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor,
        name: str = "me/teacher",
        max_model_len: int = 2048,
        max_logprobs: int = 20,
        tamper: Callable[[str, Answer], Answer] = lambda path, answer: answer,
        port: int = 0,
    ):
        self.model, self.processor, self.name = model, processor, name
        self.max_model_len, self.max_logprobs = max_model_len, max_logprobs
        self.requests: list[dict] = []
        self.is_closed = False
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 2**16  # head and body in one packet, or the client's delayed ACK adds 40 ms

            def do_GET(self):
                self.answer({"/v1/models": server.models}.get(self.path))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                replies = {
                    "/tokenize": server.tokenize,
                    "/detokenize": server.detokenize,
                    "/inference/v1/generate": server.generate,
                }
                reply = replies.get(self.path)
                self.answer(None if reply is None else lambda: reply(body))

            def answer(self, reply: Callable[[], Answer] | None) -> None:
                if server.is_closed:  # except for this connection, which was kept alive
                    self.close_connection = True
                    return
                with lock:
                    status, body = tamper(self.path, (404, {"detail": "Not Found"}) if reply is None else reply())
                body = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "ScoringServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.is_closed = True
        self._server.shutdown()
        self._server.server_close()

    def models(self) -> Answer:
        return 200, {"object": "list", "data": [{"id": self.name, "max_model_len": self.max_model_len}]}

    def tokenize(self, body: dict) -> Answer:
        template = {
            name: value for name, value in body["chat_template_kwargs"].items() if name in self.processor.chat_template
        }
        text = self.processor.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=True, **template
        )
        return 200, {"tokens": self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]}

    def detokenize(self, body: dict) -> Answer:
        return 200, {"prompt": self.processor.tokenizer.decode(body["tokens"])}

    def generate(self, body: dict) -> Answer:
        """The log-probabilities of the prompt's tokens, with each image expanded into its visual tokens."""
        self.requests.append(body)
        top_k = body["sampling_params"]["prompt_logprobs"]
        if top_k > self.max_logprobs:
            message = f"Requested prompt logprobs of {top_k}, which is greater than max allowed: {self.max_logprobs}"
            return 400, {"error": {"message": message, "code": 400}}
        images = [
            Image.open(BytesIO(base64.b64decode(part["url"].partition("base64,")[2])))
            for part in body["content_parts"]
        ]
        inputs, counts = {}, []
        if images:
            inputs = dict(self.processor.image_processor(images, return_tensors="pt"))
            counts = (inputs["image_grid_thw"].prod(dim=1) // self.processor.image_processor.merge_size**2).tolist()
        image_token_id, token_ids = self.model.config.image_token_id, []
        for token_id in body["token_ids"]:
            is_image = token_id == image_token_id and counts
            token_ids += [token_id] * (counts.pop(0) if is_image else 1)
        input_ids = torch.tensor([token_ids])
        types = (input_ids == image_token_id).int()
        with torch.no_grad():
            logits = self.model(input_ids=input_ids, mm_token_type_ids=types, **inputs).logits[0, :-1]
        logprobs = logits.log_softmax(-1)
        positions = [None]
        for token_id, row in zip(token_ids[1:], logprobs, strict=True):
            scored = {*row.topk(top_k).indices.tolist(), token_id}
            positions.append({each: {"logprob": row[each].item()} for each in scored})
        return 200, {"prompt_token_ids": token_ids, "prompt_logprobs": positions}
