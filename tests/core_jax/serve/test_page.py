"""The page in a real browser: both sides, what moved and what was added, the examples, both colour schemes.

With AFRL_SCREENSHOTS=DIR it leaves a picture of each scheme there.
"""

import os
import pathlib

import pytest

from tests.absent import absent
from tests.browser import EXECUTABLE, Browser

READY = "document.querySelectorAll('#results li').length > 0 && !document.getElementById('search').disabled"


@pytest.fixture
def browser(tmp_path):
    if EXECUTABLE is None:
        absent("no chromium or google-chrome on the path")
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


def open_page(browser, running):
    browser.send("Page.navigate", url=running.url)
    browser.wait_for("document.readyState === 'complete' && document.querySelectorAll('#examples option').length > 1")


def choose_example(browser, number):
    browser.evaluate(
        f"(() => {{ const e = document.getElementById('examples'); e.selectedIndex = {number};"
        " e.dispatchEvent(new Event('change')); })()"
    )
    browser.wait_for(READY)


def test_both_sides_are_shown_with_what_every_stage_contributed(browser, running):
    open_page(browser, running)
    choose_example(browser, 1)
    found = running.engine.search(running.contexts[0], size=10)
    for side, results in (("original", found.original), ("results", found.results)):
        titles = browser.evaluate(f"[...document.querySelectorAll('#{side} .title')].map(e => e.textContent)")
        assert titles == [result.document.title for result in results]
    fine = browser.evaluate("[...document.querySelectorAll('#results .fine')].map(e => e.textContent)")
    assert fine == [f"{r.relevance:.3f} × {r.factor:.3f} = {r.score:.3f}" for r in found.results]
    added = browser.evaluate("document.querySelectorAll('#results li.added').length")
    assert added == sum(result.original_rank is None for result in found.results)
    status = browser.evaluate("document.getElementById('status').textContent")
    assert running.rewrite in status and "used" in status
    assert running.contexts[0].watched.title in browser.evaluate("document.getElementById('watched').textContent")
    assert "finerank" in browser.evaluate("document.getElementById('stages').textContent") and not browser.errors


def test_a_rewrite_can_be_typed_and_html_in_it_stays_text(browser, running):
    open_page(browser, running)
    browser.evaluate("document.getElementById('query').value = 'chess'")
    browser.evaluate("document.getElementById('rewrite').value = '<img src=x onerror=alert(1)> guitar'")
    browser.evaluate("document.getElementById('ask').requestSubmit()")
    browser.wait_for(READY)
    assert "<img" in browser.evaluate("document.getElementById('status').textContent")
    assert browser.evaluate("document.querySelectorAll('main img').length") == 0 and not browser.errors


def test_without_a_rewrite_the_page_says_why_and_both_sides_agree(browser, running):
    open_page(browser, running)
    choose_example(browser, 2)
    sides = [
        f"[...document.querySelectorAll('#{side} .title')].map(e => e.textContent)" for side in ("original", "results")
    ]
    assert browser.evaluate(sides[0]) == browser.evaluate(sides[1])
    assert "absent" in browser.evaluate("document.getElementById('status').textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 420])
def test_it_fits_wide_and_narrow_in_both_schemes(browser, running, tmp_path, scheme, width):
    browser.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    open_page(browser, running)
    choose_example(browser, 1)
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    own = browser.evaluate("performance.getEntriesByType('resource').every(e => e.name.startsWith(location.origin))")
    assert own and not browser.errors
    folder = pathlib.Path(os.environ.get("AFRL_SCREENSHOTS", tmp_path))
    browser.screenshot(folder / f"search-{scheme}-{width}.png")
