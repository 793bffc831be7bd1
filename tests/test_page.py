"""The pages of `memlm explain --html` and of the demo, used in Chromium as a person does."""

import math
from dataclasses import replace

import pytest

from browser import Browser, require_chromium
from memlm import Document, evaluate, explain
from memlm.evaluation import ExplainedToken, Explanation, Source, tune_report
from memlm.evaluation.report import write_report

HOSTILE = "</script><script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">"
SELECTED = "document.querySelector('.t.on').textContent"
PANEL = "document.getElementById('token').innerText"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    require_chromium()
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def token(text, lm, memory, *sources, weight=0.5):
    return ExplainedToken(text, lm, memory, weight * memory + (1 - weight) * lm, weight, tuple(sources))


def source(document, text, share, before="at the end of"):
    return Source(document=document, before=before, token=text, after=" of it.", share=share, distance=7.5)


EXPLANATION = Explanation(
    (
        ExplainedToken("Return", math.nan, math.nan, math.nan, 0.0),
        token(" a", 0.5, 0.0, source("int.rst", " the", 1.0)),
        token(" new", 0.01, 0.9, source("set.rst", " new", 0.9)),
        token(" set\n", 0.001, 0.99, source("set.rst", " set\n", 0.9), source("list.rst", " list", 0.1)),
        token(" x", 0.2, 0.3, source("dict.rst", " x", 0.3), source("int.rst", " y", 0.7)),
    ),
    "What memory knows",
    settings={"k": 8, "model": "tiny"},
)


@pytest.fixture
def page(browser, tmp_path):
    EXPLANATION.save(tmp_path / "page.html")
    page = browser.open(tmp_path / "page.html")
    yield page
    assert page.errors == []
    assert page.requests == [(tmp_path / "page.html").resolve().as_uri()]


def test_every_token_is_drawn_and_colored(page):
    assert page.evaluate("document.title") == "What memory knows"
    shown = page.evaluate("[...document.querySelectorAll('#passage .t')].map(t => t.textContent.replace('⏎', ''))")
    marks = {3: " setA\n", 4: " xB"}  # a document's letter ends the words that came from it
    assert shown == [marks.get(place, item.text) for place, item in enumerate(EXPLANATION.tokens)]
    assert "Perplexity per token" in page.evaluate("document.getElementById('summary').innerText")
    grounds = page.evaluate(
        "[...document.querySelectorAll('#passage .t')].map(t => getComputedStyle(t).backgroundColor)"
    )
    assert grounds[0] == "rgba(0, 0, 0, 0)"  # not scored
    assert len({grounds[0], grounds[1], grounds[2]}) == 3  # hurt and helped tokens look different
    assert page.evaluate("[...document.querySelectorAll('#passage .memory')].length") == 3


def test_selecting_a_token_shows_its_sources(page):
    assert page.evaluate(SELECTED).startswith(" new"), "the first strongly helped token is selected at the start"
    page.click("document.querySelectorAll('#passage .t')[1]")
    assert page.evaluate(SELECTED) == " a"
    shown = page.evaluate(PANEL)
    assert "Token 2 of 5" in shown
    assert "int.rst" in shown
    assert "set.rst" not in shown
    page.press("ArrowRight")
    page.press("ArrowRight")
    shown = page.evaluate(PANEL)
    assert "Token 4 of 5" in shown
    assert "…at the end of" in shown
    assert "set.rst" in shown
    assert "list.rst" in shown
    assert page.evaluate("[...document.querySelectorAll('#token .agrees mark')].map(m => m.textContent)") == [" set⏎"]
    page.press("Home")
    assert "Not scored" in page.evaluate(PANEL)


def test_the_weight_of_each_memory_is_in_the_panel(browser, tmp_path):
    tokens = tuple(replace(item, weights=(0.04, 0.47)) for item in EXPLANATION.tokens)
    both = replace(EXPLANATION, tokens=tokens, memories=("9 entries, 1 document", "the last 7 tokens"))
    for item, named in ((both, True), (EXPLANATION, False)):
        item.save(tmp_path / "page.html")
        page = browser.open(tmp_path / "page.html")
        names = page.evaluate("[...document.querySelectorAll('#token .bars > span')].map(cell => cell.textContent)")
        assert ("λ of 9 entries, 1 document" in names) == ("λ of the last 7 tokens" in names) == named
        assert ("4.0\u00a0%" in names) == ("47\u00a0%" in names) == named
        assert page.errors == []


def test_a_document_shows_the_tokens_that_it_supports(page):
    chosen = "[...document.querySelectorAll('.from')].map(t => t.dataset.i)"
    names = page.evaluate("[...document.querySelectorAll('#where button .name')].map(n => n.textContent)")
    assert names == ["set.rst", "dict.rst"]
    page.click("document.querySelector('#where button')")
    assert page.evaluate(chosen) == ["2", "3"]
    page.press("Escape")
    assert page.evaluate(chosen) == []


@pytest.mark.parametrize(
    "explanation",
    [
        Explanation((), "empty"),
        Explanation(
            (token(HOSTILE, 0.0, 0.9, source(HOSTILE, HOSTILE, 0.9, HOSTILE)),), "hostile", settings={HOSTILE: 1}
        ),
        Explanation(EXPLANATION.tokens, "prompt", generated_from=3),
    ],
    ids=lambda item: item.title,
)
def test_pages_at_the_edge_run_without_an_error(browser, tmp_path, explanation):
    explanation.save(tmp_path / "page.html")
    page = browser.open(tmp_path / "page.html")
    assert page.evaluate("document.title") == explanation.title
    assert page.evaluate("document.querySelectorAll('#passage .t').length") == len(explanation.tokens)
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    assert (page.errors, len(page.requests)) == ([], 1)


def test_the_client_notices_errors_and_requests(browser, tmp_path):
    """The tests above would pass on anything if it did not."""
    (tmp_path / "bad.html").write_text(
        "<script src='other.js'></script><script>console.error(1); nothing.at.all</script>"
    )
    page = browser.open(tmp_path / "bad.html")
    page.evaluate("1")
    assert len(page.errors) == 3  # the missing file, the message, the exception
    assert page.requests[1].endswith("other.js")


def test_the_report_of_the_demo(browser, tmp_path, lm, memory):
    texts = ["the cat was on the roof of the house", "a bird was singing in the rain"]
    documents = [Document(id=f"<b>{number}</b>", text=text) for number, text in enumerate(texts)]
    tuning = tune_report(lm, memory, documents, show_progress=False)
    evaluation = evaluate(lm, documents, memory, tuning.best, show_progress=False)
    explanations = [explain(lm, item.text, memory, tuning.best, title=item.id) for item in documents]
    write_report(tmp_path / "report.html", "tiny & small", memory, tuning, evaluation, documents, explanations)
    page = browser.open(tmp_path / "report.html")
    assert page.evaluate("document.title") == "memlm: tiny & small with a memory"
    assert page.evaluate("document.querySelector('img').naturalWidth") > 500
    rows = page.evaluate("[...document.querySelectorAll('td:first-child')].map(cell => cell.textContent)")
    assert rows == ["lm", "knn-lm"]
    frames = "[...document.querySelectorAll('iframe')].map(frame => frame.contentDocument)"
    assert page.evaluate(f"{frames}.map(page => page.title)") == ["<b>0</b>", "<b>1</b>"]
    assert page.evaluate(f"{frames}.map(page => page.querySelectorAll('.t.on').length)") == [1, 1]
    first, address = page.evaluate(f"{frames}[0].getElementById('passage').textContent"), page.requests[0]
    assert "roof" in "".join(letter for letter in first if not letter.isupper())
    assert page.errors == []
    assert address == (tmp_path / "report.html").resolve().as_uri()
    assert all(request.startswith("data:") for request in page.requests[1:])
