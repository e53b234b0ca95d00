"""The page in a real browser: ranking, explanations, the keyboard, both colour schemes, and nothing from elsewhere.

With AFRL_SCREENSHOTS=DIR it leaves a picture of each scheme there.
"""

import json
import os
import pathlib
import re

import numpy as np
import pytest

from afrl_jax.serve.settings import Settings
from tests.absent import absent
from tests.browser import EXECUTABLE, Browser

ANSWER = "\nMatch: topic chess | chess | met; for kids | adults | violated\nRule: 4\nVerdict: "
WRITTEN_OUT = "document.querySelector('#results .rule:not([hidden])')"


@pytest.fixture(scope="module")
def server(serving, slow_scorer):
    """A scorer that likes long documents and always gives the same reason."""

    class Writing(slow_scorer):
        broken = "unscorable"

        def explanation(self, prompt, grade, max_new_tokens, salt):
            answer = grade + ANSWER + grade
            for end in range(1, len(answer), 7):
                yield answer[:end], False
            yield answer, True

    with serving(Writing, Settings(max_documents=20), keys=()) as running:
        yield running


@pytest.fixture(scope="module")
def keyed(serving, slow_scorer):
    with serving(slow_scorer, keys=("secret",)) as running:
        yield running


@pytest.fixture
def browser(tmp_path):
    if EXECUTABLE is None:
        absent("no chromium or google-chrome on the path")
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


def open_page(browser, url):
    browser.send("Page.navigate", url=url)
    browser.wait_for("document.readyState === 'complete' && document.getElementById('model')")
    browser.wait_for("!document.getElementById('model').textContent.includes('being loaded')")


def rank(browser, query, candidates):
    browser.evaluate(f"document.getElementById('query').value = {json.dumps(query)}")
    browser.evaluate(f"document.getElementById('candidates').value = {json.dumps(candidates)}")
    browser.evaluate("document.getElementById('candidates').focus()")
    browser.press("Enter", modifiers=2)
    browser.wait_for("document.querySelector('#results li') && !document.getElementById('rank').disabled")


def texts(browser, selector):
    return browser.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")


def test_candidates_are_ranked_and_a_click_explains(browser, server):
    open_page(browser, server.url)
    rank(browser, "chess for kids", "kids\nchess openings for kids\nchess kids")
    assert texts(browser, "#results .title") == ["chess openings for kids", "chess kids", "kids"]
    assert texts(browser, "#results .move") == ["was 2 ↑ 1", "was 3 ↑ 1", "was 1 ↓ 2"]
    answer = server.post("/rerank", {"query": "chess for kids", "documents": [{"title": "kids"}]}).json()["results"][0]
    assert float(texts(browser, "#results .score")[2]) == pytest.approx(answer["relevance_score"], abs=6e-4)
    assert texts(browser, "#results .grade")[2] == answer["grade"]
    widths = browser.evaluate(
        "[...document.querySelectorAll('#results li:last-child .bar span')].map(e => e.offsetWidth)"
    )
    shares = list(answer["grade_probs"].values())
    np.testing.assert_allclose(np.array(widths) / sum(widths), shares, atol=0.01)
    assert "grade 3: " in browser.evaluate("document.querySelector('.bar').getAttribute('aria-label')")

    browser.evaluate("document.querySelector('#results .row').click()")
    browser.wait_for(WRITTEN_OUT)
    assert texts(browser, "#results li:first-child td") == [
        "topic chess", "chess", "✓ met", "for kids", "adults", "✗ violated",
    ]  # fmt: skip
    assert texts(browser, "#results li:first-child .rule") == ["Decided by rule 4: another episode"]
    assert not browser.errors


def test_the_keyboard_is_enough(browser, server):
    open_page(browser, server.url)
    assert browser.evaluate("document.activeElement.id") == "query"
    browser.type("chess")
    browser.press("Tab")
    browser.type("robots\nrobots at home")
    browser.press("Enter", modifiers=2)
    browser.wait_for("document.querySelectorAll('#results li').length === 2")
    for _ in range(12):
        browser.press("Tab")
        if browser.evaluate("document.activeElement.classList.contains('row')"):
            break
    browser.press("ArrowDown")
    assert browser.evaluate("document.activeElement.closest('li').matches(':last-child')")
    outline = browser.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    browser.press("Enter", text="\r")
    browser.wait_for(WRITTEN_OUT)
    assert browser.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"


def test_pasted_cards_are_documents_with_fields(browser, server):
    open_page(browser, server.url)
    cards = "Chess openings\nminutes: 24\nexplained to\nchildren\n\nRobots\nurl http://x\n"
    found = browser.evaluate(f"parseCandidates({json.dumps(cards)})")
    assert found == [
        {"title": "Chess openings", "minutes": "24", "text": "explained to children"},
        {"title": "Robots", "text": "url http://x"},
    ]
    assert browser.evaluate("parseCandidates('a\\r\\n  b: c  \\n')") == [{"title": "a"}, {"title": "b: c"}]


def test_what_goes_wrong_is_said(browser, server):
    open_page(browser, server.url)
    rank(browser, "chess", "robots")
    browser.evaluate("document.getElementById('candidates').value = 'unscorable'")
    browser.press("Enter", modifiers=2)
    browser.wait_for("document.querySelector('#status.error')")
    assert "scoring failed" in texts(browser, "#status")[0]
    assert texts(browser, "#results .title") == ["robots"]


def test_markup_in_a_document_stays_text(browser, server):
    open_page(browser, server.url)
    rank(browser, "chess", "<img src=x onerror=\"document.title='taken'\">")
    assert browser.evaluate("document.querySelectorAll('#results img').length") == 0
    assert browser.evaluate("document.title") == "Relevance, graded"


def test_a_key_is_asked_for_where_one_is_needed(browser, keyed):
    open_page(browser, keyed.url)
    assert not browser.evaluate("document.getElementById('key-field').hidden")
    browser.evaluate("document.getElementById('key').value = 'secret'")
    rank(browser, "chess", "robots")
    assert texts(browser, "#results .title") == ["robots"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_both_schemes(browser, server, tmp_path, scheme):
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    open_page(browser, server.url)
    browser.evaluate("document.getElementById('example').click()")
    browser.wait_for("document.getElementById('candidates').value.includes('minutes')")
    browser.press("Enter", modifiers=2)
    browser.wait_for("document.querySelectorAll('#results li').length === 8")
    browser.evaluate("document.querySelector('#results .row').click()")
    browser.wait_for(WRITTEN_OUT)
    contrasts = browser.evaluate(CONTRASTS)
    assert min(contrasts.values()) >= 4.5, contrasts  # WCAG AA
    own = browser.evaluate("performance.getEntriesByType('resource').every(e => e.name.startsWith(location.origin))")
    assert own and not browser.errors
    browser.screenshot(pathlib.Path(os.environ.get("AFRL_SCREENSHOTS", tmp_path)) / f"page-{scheme}.png")


def test_no_file_of_the_page_names_another_host():
    page = pathlib.Path(__file__).parents[3] / "afrl_jax/serve/page"
    for file in page.iterdir():
        found = set(re.findall(r"https?://[^\s\"']+", file.read_text(encoding="utf-8")))
        assert found <= {"http://www.w3.org/2000/svg"}, file.name


# WCAG contrast of the text of each kind of element with the nearest opaque background behind it.
CONTRASTS = """(() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (e) => {
    const colour = channels(getComputedStyle(e).backgroundColor);
    return colour.length === 3 ? colour : behind(e.parentElement);
  };
  const selectors = ["h1", "#model", "#how", "#rank", "#example", ".title", ".rest", ".score", ".move", ".grade"];
  selectors.push("td.met", "td.violated", "th", ".state", "footer a");
  return Object.fromEntries(selectors.map((selector) => {
    const e = document.querySelector(selector);
    const [dark, bright] = [light(channels(getComputedStyle(e).color)), light(behind(e))].sort((a, b) => a - b);
    return [selector, (bright + 0.05) / (dark + 0.05)];
  }));
})()"""


def test_the_interface_is_shown_and_tried_offline(browser, server):
    browser.send("Page.navigate", url=f"{server.url}/docs")
    browser.wait_for("document.querySelectorAll('details').length && !document.getElementById('status')")
    described = server.get("/openapi.json").json()["paths"]
    assert texts(browser, "details .path") == [path for path, methods in described.items() for _ in methods]
    fields = texts(browser, "details:has(.path) table tr td:first-child code")
    assert {"query", "documents", "top_n", "text_1", "items", "explain"} <= set(fields)
    chosen = "[...document.querySelectorAll('details')].find(e => e.textContent.startsWith('POST/v1/rerank'))"
    body = json.dumps({"query": "chess", "documents": ["robots"]})
    browser.evaluate(f"{chosen}.open = true")
    browser.evaluate(f"{chosen}.querySelector('textarea').value = {json.dumps(body)}")
    browser.evaluate(f"{chosen}.querySelector('button').click()")
    browser.wait_for(f"{chosen}.querySelector('pre').textContent.startsWith('200')")
    assert '"relevance_score"' in browser.evaluate(f"{chosen}.querySelector('pre').textContent")
    assert not browser.errors
