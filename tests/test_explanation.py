"""What `memlm explain` shows, from hand-made probabilities: no model is needed."""

import io
import json
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console

from memlm.errors import ConfigError
from memlm.evaluation._explanation import ExplainedToken, Explanation, Source, Stretch
from memlm.evaluation._explanation_html import explanation_page
from memlm.evaluation._explanation_terminal import percent
from memlm.text import printable

HOSTILE = "</script><script>alert(1)</script><!-- <b onclick='x'>&amp; [bold red]x[/] __DATA__ \u2028\u2029"


def source(document, token, share=0.5, **changes):
    values = {"before": "of a", "after": " is", "distance": 12.5} | changes
    return Source(document=document, token=token, share=share, **values)


def token(text, lm, memory, *sources, weight=0.25):
    return ExplainedToken(text, lm, memory, weight * memory + (1 - weight) * lm, weight, tuple(sources))


@pytest.fixture
def explanation():
    return Explanation(
        (
            ExplainedToken("Return", math.nan, math.nan, math.nan, 0.0),
            token(" a", 0.5, 0.0, source("docs/int.rst", " the", 1.0)),
            token(" new", 0.01, 0.8, source("docs/set.rst", " new", 0.6), source("docs/list.rst", " new", 0.2)),
            token(" set", 0.002, 0.9, source("docs/set.rst", " set", 0.9), source("docs/int.rst", " int", 0.1)),
            token("\n\n", 0.05, 1.0, source("docs/set.rst", "\n\n", 1.0)),
            token("with", 0.01, 1.0, source("docs/dict.rst", "with", 1.0)),
            ExplainedToken(" x", 0.3, 0.0, 0.3, 0.0),
        ),
        "example",
        settings={"k": 8, "temperature": 10.0, "model": "tiny"},
    )


def shown(explanation, width=100, **options):
    file = io.StringIO()
    explanation.print(Console(file=file, width=width, **options))
    return file.getvalue()


def embedded(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_summary_follows_the_definitions(explanation):
    scored = explanation.tokens[1:]
    expected = sum(math.log(t.mixture) - math.log(t.lm) for t in scored) / 6
    assert explanation.gain == pytest.approx(expected)
    assert explanation.perplexity == pytest.approx(explanation.perplexity_lm * math.exp(-expected))
    assert explanation.helped == pytest.approx(4 / 6)
    assert explanation.hurt == pytest.approx(1 / 6)
    names, probabilities = zip(*explanation.documents, strict=True)
    assert names == ("docs/set.rst", "docs/dict.rst", "docs/list.rst")  # docs/int.rst never agreed
    assert probabilities == pytest.approx((0.25 * 2.5, 0.25, 0.25 * 0.2))


def test_summary_of_a_generated_text_leaves_the_prompt_out(explanation):
    generated = Explanation(explanation.tokens, "example", generated_from=5)
    assert [item.text for item in generated.summarized] == ["with", " x"]
    assert generated.documents == [("docs/dict.rst", 0.25)]


def test_levels_and_memory_share():
    assert [token("a", 0.1, memory).level for memory in (0.0, 0.1, 0.15, 0.52, 0.9)] == [-1, 0, 1, 2, 2]
    assert token("a", 1e-4, 0.9).level == 4
    assert token("a", 0.5, 0.0, weight=0.97).level == -4
    assert token("a", 0.3, 0.9, weight=0.25).memory_share == pytest.approx(0.5)
    assert not token("a", 0.31, 0.9, weight=0.25).from_memory
    assert ExplainedToken("a", 0.0, 0.0, 0.0, 0.5).bits == 0


def test_stretches_are_cut_where_no_document_supports_all(explanation):
    assert explanation.stretches == [Stretch(2, 4, "docs/set.rst"), Stretch(5, 6, "docs/dict.rst")]


def test_stretches_end_at_the_prompt_and_leave_white_space_out():
    tokens = tuple(token(text, 0.01, 1.0, source("a", text, 1.0)) for text in ("\n", "x", " y", "  "))
    assert Explanation(tokens, "", generated_from=2).stretches == [Stretch(1, 2, "a"), Stretch(2, 3, "a")]
    assert Explanation(tokens[:1], "").stretches == []
    unlisted = (token("x", 0.01, 1.0), token("y", 0.01, 1.0, source("a", "y")))
    assert Explanation(unlisted, "").stretches == [Stretch(0, 2, "a")]
    assert Explanation(unlisted[:1], "").stretches == [Stretch(0, 1, None)]


def test_json_round_trip(explanation, tmp_path):
    explanation.save(tmp_path / "explanation.json")
    data = json.loads((tmp_path / "explanation.json").read_text(encoding="utf-8"))
    again = Explanation.from_dict(data)
    assert again.to_dict() == explanation.to_dict() == data
    assert again.tokens[1:] == explanation.tokens[1:]
    assert math.isnan(again.tokens[0].lm)
    assert data["summary"]["tokens"] == 6


def test_save_refuses_other_names(explanation, tmp_path):
    with pytest.raises(ConfigError, match=r"'\.txt'.*\.html or \.json"):
        explanation.save(tmp_path / "explanation.txt")
    assert not list(tmp_path.iterdir())


def test_page_needs_nothing_from_elsewhere(explanation, tmp_path):
    explanation.save(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(
        r"https?:|//\w+\.|\bsrc\s*=|\bhref\s*=|url\(|@import|innerHTML|outerHTML|document\.write", page
    )
    assert "default-src 'none'" in page
    data = embedded(page)
    assert [item["text"] for item in data["tokens"]] == [item.text for item in explanation.tokens]
    assert data["stretches"] == [[2, 4, "docs/set.rst"], [5, 6, "docs/dict.rst"]]
    assert [item["agrees"] for item in data["tokens"][3]["sources"]] == [True, False]


def test_hostile_texts_stay_inside_the_data():
    hostile = source(HOSTILE, HOSTILE, before=HOSTILE, after=HOSTILE, distance=math.inf)
    explanation = Explanation((token(HOSTILE, 0.0, 0.9, hostile),), HOSTILE, settings={HOSTILE: HOSTILE})
    page = explanation_page(explanation)
    template = explanation_page(Explanation((), ""))
    assert page.count("<") == template.count("<")
    assert not set("\u2028\u2029") & set(page)
    data = embedded(page)
    assert data["tokens"][0]["text"] == data["title"] == printable(HOSTILE)
    assert data["tokens"][0]["sources"][0]["distance"] is None
    text = shown(explanation, width=400)
    assert "[bold red]x[/]" in text
    assert "</script>" in text


def test_texts_that_are_no_unicode_or_move_the_cursor(tmp_path):
    text = "\ud83d\ufffd\x1b]0;title\x07\u202e\r\n"
    explanation = Explanation((token(text, 0.01, 0.9, source("d\udc80", text)),), "\x1b[2J")
    for name in ("a.html", "a.json"):
        explanation.save(tmp_path / name)
        (tmp_path / name).read_text(encoding="utf-8")
    output = shown(explanation)
    assert not set("\x1b\x07\u202e\ud83d\udc80") & set(output)
    assert "␛]0;title␇" in output
    assert printable("tab\t, é, 汉\r\n") == "tab\t, é, 汉\n"


def test_terminal_without_color_marks_words_and_numbers_notes(explanation):
    output = shown(explanation)
    assert "\x1b" not in output
    assert "Return a ⟦new set¹⟧⏎\n⏎\n⟦with²⟧ x" in output
    assert re.search(r"^1 +set +0\.20 % → 23 % +90 % +docs/set\.rst", output, re.MULTILINE)
    assert "of a ⟦set⟧ is" in output
    assert re.search(r"━ +68 % +docs/set\.rst", output)


def of_two_memories(explanation):
    """Give every token λ of two memories, which add up to its λ."""
    tokens = [replace(item, weights=(0.04 * item.weight, 0.96 * item.weight)) for item in explanation.tokens]
    return replace(explanation, tokens=tuple(tokens), memories=("9 entries, 1 document", "the last 7 tokens"))


def test_the_weight_of_each_memory_is_in_the_terminal(explanation):
    output = shown(of_two_memories(explanation), width=120)
    mean = 0.25 * 5 / 6
    weights = f"{percent(0.04 * mean)} (9 entries, 1 document) + {percent(0.96 * mean)} (the last 7 tokens)"
    assert f"mean λ {weights}" in output
    assert re.search(r"^1 +set +0\.20 % → 23 % +1\.0 % \+ 24 % +90 % +docs/set\.rst", output, re.MULTILINE)
    assert "λ" not in shown(explanation)


def test_no_color_is_respected_on_a_terminal(explanation, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    output = shown(explanation, force_terminal=True, color_system="truecolor")
    assert "⟦new set" in re.sub(r"\x1b\[[\d;]*m", "", output)
    assert not re.search(r"\x1b\[[\d;]*[34]8;", output)


def test_terminal_with_color(explanation):
    output = shown(explanation, force_terminal=True, color_system="truecolor")
    assert re.search(r"\x1b\[1;4;38;2;[\d;]+48;2;[\d;]+m", output)  # bold and underlined on a ground
    assert "⟦" not in output


@pytest.mark.parametrize("width", [20, 60, 200])
def test_terminal_of_any_width(explanation, width):
    for item in (explanation, of_two_memories(explanation)):
        assert all(len(line) <= width for line in shown(item, width).splitlines())


def test_prompt_is_set_apart(explanation):
    generated = Explanation(explanation.tokens, "example", generated_from=5)
    before, after = shown(generated).split("the model wrote from here")
    assert "new set⟧" in before
    assert "⟦with¹⟧ x" in after


@pytest.mark.parametrize(
    "tokens",
    [(), (ExplainedToken("a", math.nan, math.nan, math.nan, 0.0),), (ExplainedToken("", 0.0, 0.0, 0.0, 0.0),)],
    ids=["none", "unscored", "impossible"],
)
def test_nothing_to_show(tokens, tmp_path):
    explanation = Explanation(tokens, "empty", generated_from=len(tokens))
    explanation.save(tmp_path / "a.html")
    explanation.save(tmp_path / "a.json")
    assert "No token was scored" in shown(explanation)
    assert explanation.gain == 0
    assert math.isnan(explanation.perplexity)
    assert explanation.documents == explanation.stretches == []
    assert shown(Explanation(tokens, "empty"))


def test_percent():
    values = [math.nan, 0.0, 1e-9, 2e-4, 0.034, 0.45, 1.0]
    assert [percent(value) for value in values] == ["–", "<0.01 %", "<0.01 %", "0.02 %", "3.4 %", "45 %", "100 %"]
