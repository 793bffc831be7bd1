"""Log-probabilities of a prompt from an OpenAI-compatible completions endpoint.

Only the standard library is used. The API key is sent in a header and appears nowhere else: it is kept out of messages,
also where a server repeats it, and redirects are refused, because they would take it to another server.
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress
from http.client import HTTPException, IncompleteRead
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ..errors import ConfigError, EndpointError
from ._echo import Echo, read_echo
from ._token_names import TokenNames

_NAME_BY_ID = "return_tokens_as_token_ids"  # vLLM's extra field: tokens are then called "token_id:17", not by text
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_TRANSIENT_ERRORS = (TimeoutError, ConnectionResetError, ConnectionAbortedError, BrokenPipeError, IncompleteRead)
_HINTS = {
    401: "set OPENAI_API_KEY, or pass api_key",
    403: "set OPENAI_API_KEY, or pass api_key",
    404: "check the model's name, and that the URL is the base of the API, such as http://localhost:8000/v1",
}
_LONGEST_ANSWER = 1 << 28  # bytes; some 30 MB are asked for
_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?")  # a name or an address
_LONGEST_TIMEOUT = 86_400  # seconds
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds between two attempts


class Endpoint:
    """POST {url}/completions.

    Args:
        url: Base of the API, such as http://localhost:8000/v1.
        model: Name of the model there.
        api_key: None takes the environment's OPENAI_API_KEY, if there is one.
        timeout: Seconds to wait for the server, each time.
        retries: Further attempts after 408, 425, 429, 5xx, time-outs and broken connections, with growing waits, or as
            long as the server asks, up to 30 seconds.

    Raises:
        ConfigError: The URL is none, or holds a password or a query; a number is out of its range.
    """

    def __init__(self, url: str, model: str, api_key: str | None, timeout: float, retries: int) -> None:
        if not _is_base(url):
            # it is not shown: what is wrong with it may be a password in it
            raise ConfigError(
                "the endpoint's URL is not of the form http[s]://host[:port]/path, in ASCII and without name, password "
                "and query; expected something like http://localhost:8000/v1 (an API key goes into OPENAI_API_KEY)"
            )
        if not 0 < timeout <= _LONGEST_TIMEOUT or type(retries) is not int or retries < 0:
            raise ConfigError(
                f"timeout {timeout} and retries {retries}: expected more than 0, up to {_LONGEST_TIMEOUT:,} seconds, "
                "and a whole number from 0 on"
            )
        self.url, self.model, self.timeout, self.retries = url.rstrip("/"), model, timeout, retries
        self._key = (os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key).strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError("the API key holds characters that no header can carry; expected printable ASCII")
        self._opener = build_opener(_NoRedirects)
        self._extra: dict[str, Any] = {_NAME_BY_ID: True}

    def echo(self, prompts: list[list[int]], top: int, names: TokenNames) -> list[Echo]:
        """Ask for the log-probabilities of some prompts.

        Args:
            prompts: Token ids, at least two each.
            top: Most likely tokens wanted in every place; may be 0.
            names: The encoder's names of tokens.

        Raises:
            EndpointError: It cannot be reached, refuses, or answers something else.
        """
        # one token is generated and thrown away, because several servers refuse max_tokens 0, and logprobs 0
        body = {"model": self.model, "prompt": prompts, "max_tokens": 1, "temperature": 0, "echo": True}
        answer = self._post(body | {"logprobs": max(1, top)})
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise self.error('answers JSON without a list of "choices"; expected that of an OpenAI completion')
        if len(choices) != len(prompts):
            raise self.error(f"gives {len(choices)} choices for {len(prompts)} prompts; expected one for each")
        numbers = [choice.get("index") for choice in choices]
        if any(number is not None for number in numbers):
            if not all(type(number) is int for number in numbers) or sorted(numbers) != list(range(len(prompts))):
                raise self.error("numbers its choices otherwise than from 0 on; expected an index for each prompt")
            choices = sorted(choices, key=lambda choice: choice["index"])
        try:
            return [read_echo(choice, ids, names, top) for choice, ids in zip(choices, prompts, strict=True)]
        except EndpointError as error:
            raise self.error(self._hidden(error)) from None

    def error(self, what: str) -> EndpointError:
        """Return an error about this endpoint."""
        return EndpointError(f"{self.url} {what}")

    def _post(self, body: dict[str, Any]) -> Any:
        """Send a request, again if need be, and return the JSON of the answer."""
        headers = {"Content-Type": "application/json", "User-Agent": "memlm"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        attempt = 0
        while True:
            data = json.dumps(body | self._extra).encode()
            wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT)
            try:
                request = Request(f"{self.url}/completions", data, headers)  # noqa: S310  (http or https alone)
                with self._opener.open(request, timeout=self.timeout) as response:
                    text = response.read(_LONGEST_ANSWER + 1)
                break
            except HTTPError as error:
                said = self._said(error)
                if error.code in (400, 422) and _NAME_BY_ID in said and self._extra:
                    self._extra = {}  # a server that takes none but its own fields
                    continue
                if error.code not in _TRANSIENT or attempt >= self.retries:
                    hint = _HINTS.get(error.code, "it must take token ids as prompt, echo and logprobs")
                    if error.code in _TRANSIENT:
                        hint = f"tried {attempt + 1} times; try again later, or allow more retries"
                    raise self.error(f"answers {error.code} ({said[:300] or error.reason}); {hint}") from error
                with suppress(TypeError, ValueError):
                    wait = min(max(0.0, float(error.headers["Retry-After"])), _LONGEST_WAIT)
            except (URLError, HTTPException, OSError, UnicodeError) as error:
                cause = getattr(error, "reason", error)
                if not isinstance(cause, _TRANSIENT_ERRORS) or attempt >= self.retries:
                    reason = f"no answer in {self.timeout:g} seconds" if isinstance(cause, TimeoutError) else cause
                    raise self.error(
                        f"cannot be reached ({self._hidden(reason)}); tried {attempt + 1} times; check that the server "
                        "runs, and the URL"
                    ) from error
            attempt += 1
            time.sleep(wait)
        if len(text) > _LONGEST_ANSWER:
            raise self.error(f"answers more than {_LONGEST_ANSWER:,} bytes; check the URL")
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            start = self._hidden(text[:80].decode(errors="replace"))
            raise self.error(f"answers something else than JSON ({start!r}); check the URL") from error

    def _said(self, error: HTTPError) -> str:
        """Return what a server says to a refused request."""
        text = b""
        with error, suppress(OSError, HTTPException):
            text = error.read(1 << 16)
        message: Any = text.decode(errors="replace")
        with suppress(ValueError, AttributeError, RecursionError):
            told = json.loads(message)
            inner = told.get("error")
            message = (inner.get("message") if isinstance(inner, dict) else inner) or told.get("message")
            message = message or told.get("detail") or told
        return self._hidden(message)

    def _hidden(self, message: Any) -> str:
        """Return a message in one line, without control characters and the API key."""
        text = " ".join(str(message).split())
        text = "".join(character if character.isprintable() else "�" for character in text)
        return text.replace(self._key, "***") if self._key else text


def _is_base(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host = "" if parts.port == 0 else (parts.hostname or "").encode("idna").decode()
    except ValueError:  # also of a name with an empty part, or one that is too long
        return False
    plain = parts.scheme in ("http", "https") and not ("@" in parts.netloc or parts.query or parts.fragment)
    # what urlsplit lets pass, or leaves out, and no request can carry
    sendable = url.isascii() and url.isprintable() and " " not in url
    return plain and sendable and _HOST.fullmatch(host) is not None


class _NoRedirects(HTTPRedirectHandler):
    """Redirects become errors."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        """Follow none."""
