"""The page of a search in a real browser, from a file and without a network: drawn, linked, sorted, hostile texts as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from opened_page import Opened, open_page
from report_data import HOSTILE
from search_data import demo_trials, publish_search, result_of

from urbanclip_ray.evaluate.search_page import write_search_page

pytestmark = pytest.mark.slow

TIMEOUT_MS = 60_000
NUM_TRIALS = 12
FADED, SHOWN = 0.12, 1


@pytest.fixture(scope="module")
def search_page(tmp_path_factory) -> str:
    """Finished, stopped and failed trials; one has a hostile value and a hostile error."""
    run = str(tmp_path_factory.mktemp("page") / "demo_search")
    config, trials = demo_trials(NUM_TRIALS)
    results = []
    for trial in trials[:-1]:
        score = 0.3 + 0.02 * ((7 * trial.number) % NUM_TRIALS)
        results.append(result_of(run, trial, [score / 2, score] if trial.number % 3 == 2 else [score / 2, score / 1.2, score]))
    hostile = trials[-1]._replace(values=trials[-1].values | {"train.lr": HOSTILE[1]})
    return write_search_page(publish_search(run, config, [*results, result_of(run, hostile, [], failure=HOSTILE[0])]))


@pytest.fixture(params=[("light", 1280), ("dark", 390)], ids=["light and wide", "dark and narrow"])
def opened(request, search_page, browser) -> Iterator[Opened]:
    with open_page(browser, search_page, *request.param, TIMEOUT_MS) as found:
        for place in found.page.locator(".plot").all():
            place.scroll_into_view_if_needed()
        found.page.wait_for_function(
            "[...document.querySelectorAll('.plot')].every((place) => place.dataset.drawn === 'yes')", timeout=TIMEOUT_MS
        )
        yield found


def opacities(page: Any, figure: str) -> dict[str, float]:
    """How visible every trial is in a plot."""
    found: dict[str, float] = page.evaluate(
        """(figure) => Object.fromEntries(document.querySelector(`[data-figure="${figure}"]`).data
            .filter((trace) => trace.meta !== undefined).map((trace) => [trace.meta, trace.opacity ?? 1]))""",
        figure,
    )
    return found


def test_the_page_is_drawn_from_its_file_without_a_complaint(opened):
    page = opened.page
    assert opened.complaints == []
    assert set(opened.requests) <= {"file", "data", "blob"}
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    assert [place.get_attribute("data-figure") for place in page.locator(".plot").all()] == [
        *("coordinates", "curves", "cost-samples", "cost-seconds", "importance")
    ]


def test_words_of_the_coordinates_do_not_overlap(opened):
    """Titles beside titles, and the ticks of one axis."""
    boxes = opened.page.evaluate(
        """[...document.querySelectorAll('[data-figure="coordinates"] .annotation-text-g')].map((words) => {
            const box = words.getBoundingClientRect();
            return [words.textContent, box.left, box.right, box.top, box.bottom];
        })"""
    )
    assert len(boxes) > 10
    for at, (words, left, right, top, bottom) in enumerate(boxes):
        for other, other_left, other_right, other_top, other_bottom in boxes[at + 1 :]:
            apart = right <= other_left or other_right <= left or bottom <= other_top + 1 or other_bottom <= top + 1
            assert apart, f"{words!r} lies over {other!r}"


def test_a_trial_pointed_at_in_the_table_stands_out_in_every_plot(opened):
    page = opened.page
    page.locator('tr[data-trial="4"] th').hover()
    page.wait_for_selector('tr[data-trial="4"].pointed', timeout=TIMEOUT_MS)
    for figure in ("coordinates", "curves", "cost-samples", "cost-seconds"):
        found = opacities(page, figure)
        assert found.pop("4") == SHOWN
        assert set(found.values()) == {FADED}
    page.locator("h1").hover()
    page.wait_for_function("document.querySelector('tr.pointed') === null", timeout=TIMEOUT_MS)
    assert set(opacities(page, "curves").values()) == {SHOWN}


def test_a_click_on_options_selects_all_that_is_to_be_copied(opened):
    page = opened.page
    page.locator("pre.copied").first.click()
    selected = page.evaluate("getSelection().toString()")
    assert selected.startswith("--set train.lr=")
    assert selected.count("--set") == 4


def test_the_table_sorts_and_what_is_hostile_is_text(opened):
    page = opened.page
    page.locator("#trials thead button").nth(0).click()
    numbers = [row.get_attribute("data-trial") for row in page.locator("#trials tbody tr").all()]
    assert numbers == [str(number) for number in range(NUM_TRIALS - 1, -1, -1)]
    assert opened.dialogs == []
    assert page.locator("#trials .reason", has_text=HOSTILE[0]).count() == 1
    assert page.locator("main img").count() == 0
