"""An OpenAI-compatible completions endpoint over a tiny model: real HTTP on this machine, for the length of a test."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


class Server(ThreadingHTTPServer):
    """Settings that a test changes, and the requests that came.

    names: how tokens are called: "ids" (only if asked), "vocabulary" or "decoded".
    limit: Most alternatives a token; the target is added to them, as vLLM does.
    added: Where the target is added: "first", as by vLLM, or "last"; of names that are the same the last one is told.
    refusals: (status, headers, body) sent first, one a request.
    change: Alters the answer before it is sent.
    """

    daemon_threads = True

    def __init__(self, model, tokenizer):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.tokenizer = model, tokenizer
        self.names, self.limit, self.strict = "ids", None, False
        self.added = "first"
        self.refusals, self.change, self.delays = [], lambda answer: answer, []
        self.requests, self.headers = [], []
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def complete(self, body):
        """Answer a request; generation is not simulated: the token generated is the most likely one."""
        prompts, top = body["prompt"], body["logprobs"]
        by_id = self.names == "ids" and body.get("return_tokens_as_token_ids")

        def name(token):
            if by_id:
                return f"token_id:{token}"
            if self.names == "vocabulary":
                return self.tokenizer.convert_ids_to_tokens(token)
            return self.tokenizer.decode([token])

        choices = []
        for index, ids in enumerate(prompts):
            with torch.no_grad():
                log_probs = self.model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
            ids = [*ids, int(log_probs[-1].argmax())]
            told = {"tokens": [name(token) for token in ids], "token_logprobs": [None], "top_logprobs": [None]}
            for token, row in zip(ids[1:], log_probs.tolist(), strict=True):
                best = sorted(range(len(row)), key=lambda place: -row[place])[: min(top, self.limit or top)]
                told["token_logprobs"].append(row[token])
                order = [token, *best] if self.added == "first" else [*best, token]
                told["top_logprobs"].append({name(other): row[other] for other in dict.fromkeys(order)})
            choices.append({"index": index, "text": "", "logprobs": told, "finish_reason": "length"})
        return {"object": "text_completion", "model": body["model"], "choices": choices[::-1]}


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.headers.append(dict(self.headers))
            refusal = self.server.refusals.pop(0) if self.server.refusals else None
            delay = self.server.delays.pop(0) if self.server.delays else 0
        time.sleep(delay)
        if refusal is None and self.server.strict and "return_tokens_as_token_ids" in body:
            message = "Unrecognized request argument supplied: return_tokens_as_token_ids"
            refusal = 400, {}, {"error": {"message": message}}
        if refusal is None and self.path != "/v1/completions":
            refusal = 404, {}, {"detail": "Not Found"}
        answer = refusal or (200, {}, self.server.change(self.server.complete(body)))
        status, headers, content = answer
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(model, tokenizer):
    """Serve a model while the block runs."""
    with Server(model, tokenizer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
