"""A small client of Chromium's DevTools protocol over pipes, so that tests can use a page as a person does."""

import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from contextlib import suppress

import pytest

_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
    "--window-size=1280,900",
]
# Chromium reads commands from descriptor 3 and writes answers to descriptor 4.
_LAUNCHER = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
_PATIENCE = 120  # seconds for an answer, on a busy machine


def require_chromium() -> str:
    """Return the program; without one skip the test, or fail where everything is required."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None and os.environ.get("MEMLM_REQUIRE_ALL"):
        pytest.fail("no chromium here, and MEMLM_REQUIRE_ALL is set: install the package chromium")
    if program is None:
        pytest.skip("no chromium here; tests of the page need it")
    return program


class Browser:
    """A headless Chromium with a profile of its own."""

    def __init__(self, folder):
        program = require_chromium()
        read_commands, self._write = os.pipe()
        self._read, write_answers = os.pipe()
        command = [sys.executable, "-ISc", _LAUNCHER, str(read_commands), str(write_answers)]
        self._process = subprocess.Popen(
            [*command, program, *_FLAGS, f"--user-data-dir={folder}"],
            pass_fds=(read_commands, write_answers),
            env=os.environ | {"HOME": str(folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_commands)
        os.close(write_answers)
        self._numbers = itertools.count(1)
        self._rest = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with suppress(OSError):
            self.send("Browser.close")
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def send(self, method, session=None, **parameters):
        """Send a command and return its number."""
        message = {"id": next(self._numbers), "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        return message["id"]

    def receive(self):
        """Return the next answer or event."""
        deadline = time.monotonic() + _PATIENCE
        poll = select.poll()  # unlike select(), of any number of a descriptor
        poll.register(self._read, select.POLLIN)
        while b"\0" not in self._rest:
            ready = poll.poll(1000 * max(0.0, deadline - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            assert data, f"Chromium said nothing for {_PATIENCE} s, or ended with {self._process.poll()}"
            self._rest += data
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, path):
        """Load a file in a new page."""
        return Page(self, path)


class Page:
    """One page, with what it said and asked for.

    Attributes:
        errors: Exceptions, and what reached the console as an error or a warning.
        requests: Addresses, in order.
    """

    def __init__(self, browser, path):
        self._browser, self._session = browser, None
        self.errors, self.requests = [], []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self._loaded = False
        self._call("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._note(browser.receive())

    def _call(self, method, **parameters):
        number = self._browser.send(method, self._session, **parameters)
        while (answer := self._browser.receive()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _note(self, event):
        if event.get("sessionId") != self._session:
            return
        values = event.get("params", {})
        match event.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.exceptionThrown":
                self.errors.append(values["exceptionDetails"])
            case "Runtime.consoleAPICalled" if values["type"] in ("error", "warning", "assert"):
                self.errors.append(values["args"])
            case "Log.entryAdded" if values["entry"]["level"] in ("error", "warning"):
                self.errors.append(values["entry"])
            case "Network.requestWillBeSent":
                self.requests.append(values["request"]["url"])

    def evaluate(self, script):
        """Return the value of a JavaScript expression, after the next frame was drawn."""
        waiting = f"new Promise(done => requestAnimationFrame(() => done({script})))"
        result = self._call("Runtime.evaluate", expression=waiting, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def click(self, element):
        """Click into the middle of what a JavaScript expression gives."""
        script = f"(e => (e.scrollIntoView({{block: 'center'}}), e.getClientRects()[0].toJSON()))({element})"
        box = self.evaluate(script)
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def press(self, key):
        """Press a key, such as "ArrowRight"."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key)
