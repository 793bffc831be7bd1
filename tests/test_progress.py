"""What is shown of long work: a bar on a terminal, one line elsewhere."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time

import pytest

from memlm.progress import progress


def on_a_terminal(monkeypatch, work, width=80):
    """Run something with stderr on a terminal, and return what reached that."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    with os.fdopen(slave, "w") as stderr, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stderr)
        work()
    shown = b""
    while True:
        try:
            data = os.read(master, 1 << 16)
        except OSError:  # how a terminal without a writer ends
            data = b""
        if not data:
            os.close(master)
            return shown.decode()
        shown += data


def frames(shown):
    """Return what stood on the line, one after the other, without colors and cursor movements."""
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown)
    return [line for line in re.split(r"[\r\n]+", plain) if line]


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_shows_share_rate_and_time_left(monkeypatch, width):
    def work():
        with progress("reading keys", 123_456_789) as advance:
            for _ in range(8):
                time.sleep(0.06)
                advance(10_000_000)

    shown = frames(on_a_terminal(monkeypatch, work, width))
    assert all(len(line) < width for line in shown), shown
    running = [line for line in shown if re.search(r"reading keys ━.* +\d+ % [\d,]+ tokens/s \d:\d\d:\d\d left", line)]
    assert running, shown
    assert "65 %" in shown[-1]


def test_the_end_shows_the_mean_rate_and_the_time_taken(monkeypatch):
    def work():
        with progress("tuning", 1000, "things") as advance:
            time.sleep(0.3)
            advance(10)
            time.sleep(0.02)
            advance(990)

    last = frames(on_a_terminal(monkeypatch, work))[-1]
    shown = re.search(r"100 % ([\d,]+) things/s 0:00:0\d$", last)
    assert shown, last
    assert int(shown[1].replace(",", "")) <= 1000 / 0.32, "the speed at the end, not over everything"


def test_amount_and_rate_where_the_total_is_unknown(monkeypatch):
    def work():
        with progress("tokenizing", None, "bytes") as advance:
            time.sleep(0.1)
            advance(12_345)

    last = frames(on_a_terminal(monkeypatch, work))[-1]
    assert re.search(r"tokenizing .* 12,345 [\d,]+ bytes/s 0:00:0\d$", last), last
    assert "%" not in last


def test_one_plain_line_elsewhere(capsys):
    with progress("scoring", 10) as advance:
        advance(4)
        advance(6)
    out, err = capsys.readouterr()
    assert re.fullmatch(r"scoring: 10 tokens in [\d.]+ s, [\d,]+ tokens/s\n", err)
    assert out == ""


def test_nothing_is_claimed_of_work_that_failed(capsys):
    with pytest.raises(ZeroDivisionError), progress("scoring", 10):
        raise ZeroDivisionError
    assert capsys.readouterr().err == ""


def test_nothing_where_nothing_is_wanted(capsys):
    with progress("scoring", 10, show=False) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")
