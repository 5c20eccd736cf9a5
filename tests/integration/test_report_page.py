"""The report in a real browser, from a file and without a network: no errors, hover, sorting, choices, hostile texts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from opened_page import Opened, open_page
from report_data import HOSTILE, HOSTILE_TILE, INDICATORS, MEANS, make_run, make_scores, paired, world_config

from urbanclip_ray.evaluate.compare import compare_runs
from urbanclip_ray.evaluate.report import write_report
from urbanclip_ray.imagery import decode
from urbanclip_ray.schema import PREDICTIONS
from urbanclip_ray.storage import open_dataset, publish

pytestmark = pytest.mark.slow

NUM_TILES = 40
TIMEOUT_MS = 30_000


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("report")
    scores = make_scores(MEANS, null_methods=("colour",))
    scores["paired"] = [paired(INDICATORS[0], 0.11), paired(INDICATORS[1], 0.02)]
    datasets, _ = make_run(root, num_tiles=NUM_TILES, scores=scores)
    write_report(world_config(), datasets, str(root / "report"))
    return str(root / "report" / "report.html")


@pytest.fixture(params=[("light", 1280), ("dark", 390)], ids=["light and wide", "dark and narrow"])
def opened(request, report, browser) -> Iterator[Opened]:
    with open_page(browser, report, *request.param, TIMEOUT_MS) as found:
        yield found


def scroll_to(page: Any, selector: str) -> Any:
    element = page.locator(selector)
    element.scroll_into_view_if_needed()
    page.wait_for_selector(f'{selector}[data-drawn="yes"]', timeout=TIMEOUT_MS)
    return element


def place_of_tile(page: Any, selector: str, index: int) -> tuple[float, float]:
    """Where a tile of a map is in the window, px."""
    x, y = page.evaluate(
        """([selector, index]) => {
            const canvas = document.querySelector(selector), box = canvas.getBoundingClientRect(), place = geometry(canvas);
            return [box.left + place.x(place.area.lon[index]), box.top + place.y(place.area.lat[index])];
        }""",
        [selector, index],
    )
    return x, y


def test_the_whole_page_is_drawn_from_its_file_without_a_complaint(opened):
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
    for place in page.locator(".plot, canvas.map").all():
        if place.is_visible():
            place.scroll_into_view_if_needed()
    page.wait_for_function(
        """() => [...document.querySelectorAll('.plot, canvas.map')].every(
            (place) => place.offsetParent === null || place.dataset.drawn === 'yes')""",
        timeout=TIMEOUT_MS,
    )
    assert opened.complaints == []
    assert set(opened.requests) <= {"file", "data", "blob"}
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    assert all(box["height"] >= 150 for place in page.locator(".plot").all() if (box := place.bounding_box()))


def test_hostile_texts_are_text(opened):
    page = opened.page
    assert opened.dialogs == []
    assert page.evaluate("document.scripts.length") == 5
    assert page.locator("b, .card img[onerror], .hits b").count() == 0
    for text in HOSTILE:
        assert page.locator(".card li", has_text=text).count() >= 1
    assert page.locator("#board-0 th button", has_text=INDICATORS[1]).count() == 1


def test_a_tile_is_shown_under_the_pointer_with_its_figures(opened):
    page, selector = opened.page, 'canvas[data-kind="truth"][data-panel="0"]'
    scroll_to(page, selector)
    page.mouse.move(*place_of_tile(page, selector, 0))
    page.wait_for_selector('#tip canvas[data-shown="0"]', timeout=TIMEOUT_MS)
    lines = page.locator("#tip .lines div").all_text_contents()
    assert lines[0] == HOSTILE_TILE
    assert [line.split()[0] for line in lines[1:]] == ["truth", "prediction", "residual"]
    residual, truth, prediction = (float(line.split()[1].replace("−", "-")) for line in (lines[3], *lines[1:3]))
    assert residual == pytest.approx(prediction - truth, abs=2e-3)
    box = page.locator("#tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= page.viewport_size["width"]
    page.mouse.move(5, 5)
    assert page.locator("#tip").is_hidden()


def test_the_picture_under_the_pointer_is_the_tile_s_own(opened, report):
    page, selector, index = opened.page, 'canvas[data-kind="split"]', 7
    scroll_to(page, selector)
    page.mouse.move(*place_of_tile(page, selector, index))
    page.wait_for_selector(f'#tip canvas[data-shown="{page.evaluate(f"maps.areas[0].tile[{index}]")}"]', timeout=TIMEOUT_MS)
    shown = page.evaluate("[...document.querySelector('#tip canvas').getContext('2d').getImageData(0, 0, 112, 112).data]")
    pixels = np.array(shown, dtype=float).reshape(112, 112, 4)[..., :3]
    tiles = open_dataset(report.replace("report/report.html", "tiles")).read(["tile_id", "image"]).to_pylist()
    distances = {}
    for tile in tiles:
        if tile["image"] != b"broken":
            wanted = np.asarray(decode(tile["image"]).resize((112, 112)), dtype=float)
            distances[tile["tile_id"]] = np.abs(pixels - wanted).mean()
    assert min(distances, key=distances.__getitem__) == tiles[index]["tile_id"]
    assert page.locator("#tip .lines div").first.text_content() == tiles[index]["tile_id"]


def test_a_tile_without_a_picture_and_a_point_of_the_scatter_show_their_words(opened):
    page, selector = opened.page, 'canvas[data-kind="truth"][data-panel="0"]'
    scroll_to(page, selector)
    page.mouse.move(*place_of_tile(page, selector, 1))
    assert page.locator("#tip .lines div").all_text_contents() == ["world/0001", "not in the test part"]
    assert page.locator("#tip canvas").is_hidden()
    scroll_to(page, '.plot[data-figure="scatter-0"]')
    page.locator('.plot[data-figure="scatter-0"] .scatterlayer .point').nth(3).hover(force=True)
    page.wait_for_function("!document.getElementById('tip').hidden", timeout=TIMEOUT_MS)
    assert page.locator("#tip .lines div").count() == 4


def test_a_click_on_a_heading_sorts_the_leaderboard(opened):
    page, button = opened.page, opened.page.locator("#board-0 thead button").nth(1)
    cells = page.locator("#board-0 tbody tr td:nth-child(2)")

    def values() -> list[str]:
        return [cell.get_attribute("data-value") for cell in cells.all()]

    button.click()
    down = values()
    assert down[-1] == "", "an undefined score comes last"
    assert [float(value) for value in down[:-1]] == sorted((float(value) for value in down[:-1]), reverse=True)
    button.click()
    assert values() == [*down[:-1][::-1], ""]
    assert page.locator("#board-0 th[aria-sort]").get_attribute("aria-sort") == "ascending"
    page.locator("#board-0 thead button").first.click()
    names = page.locator("#board-0 tbody th").all_text_contents()
    assert names == sorted(names, key=str.lower, reverse=True)


def test_choices_show_one_of_several(opened):
    page = opened.page
    assert page.locator("#board-0").is_visible()
    page.select_option('select[name="board"]', "1")
    assert page.locator("#board-0").is_hidden()
    assert page.locator("#board-1").is_visible()
    page.select_option('select[name="panel"]', "1")
    scroll_to(page, 'canvas[data-kind="residual"][data-panel="1"]')
    assert page.locator('canvas[data-panel="0"]').first.is_hidden()


def test_maps_zoom_together_and_come_back(opened):
    page, selector = opened.page, 'canvas[data-kind="truth"][data-panel="0"]'
    scroll_to(page, selector)
    before = place_of_tile(page, selector, 0)
    zoom = page.locator('button[data-view="panel-0"]')
    zoom.first.click()
    assert page.evaluate(f"viewOf(document.querySelector('{selector}')).zoom") == 2
    other = 'canvas[data-kind="residual"][data-panel="0"]'
    assert page.evaluate(f"geometry(document.querySelector('{other}')).degree") == pytest.approx(
        page.evaluate(f"geometry(document.querySelector('{selector}')).degree")
    )
    zoom.last.click()
    page.locator(selector).scroll_into_view_if_needed()
    assert page.evaluate(f"viewOf(document.querySelector('{selector}')).zoom") == 1
    assert place_of_tile(page, selector, 0)[0] == pytest.approx(before[0], abs=1)


def test_a_comparison_of_two_runs_is_drawn_and_sorts(browser, tmp_path):
    for name, gain in (("a", 0.0), ("b", 0.3)):
        root = tmp_path / name
        datasets, _ = make_run(root, num_tiles=NUM_TILES)
        rows = datasets["probe"].read().to_pandas()
        rows["y_pred"] += gain * (rows["y"] - rows["y_pred"])
        with publish(str(root / "better"), "probe", {}, {}) as publication:
            publication.write_table(pa.Table.from_pandas(rows, schema=PREDICTIONS, preserve_index=False))
        run = {"run": name + HOSTILE[0], "datasets": {"probe": "better"}, "config": {"train": {"lr": gain, "x": HOSTILE[1]}}}
        (root / "run.json").write_text(json.dumps(run))
    _, page_uri = compare_runs(str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "compare"))
    context = browser.new_context(viewport={"width": 390, "height": 900}, offline=True)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"file://{page_uri}")
    page.wait_for_selector("html[data-drawn]", timeout=TIMEOUT_MS)
    scroll_to(page, '.plot[data-figure="differences-1"]')
    differences = page.locator("#differences td:nth-child(6)")
    page.locator("#differences thead button", has_text="Difference").click()
    values = [float(cell.get_attribute("data-value")) for cell in differences.all()]
    assert len(values) == 8
    assert values == sorted(values, reverse=True)
    assert values[-1] > 0
    assert page.locator("th", has_text="train.lr").count() == 1
    assert page.locator("th", has_text="train.x").count() == 0  # the same in both
    assert page.evaluate("document.scripts.length") == 4
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert complaints == []
    context.close()


def test_the_policy_of_the_page_keeps_it_from_fetching(opened):
    page = opened.page
    page.evaluate("new Image().src = 'http://evil.example/x.png'")
    page.evaluate("fetch('http://evil.example/').catch(() => {})")
    page.wait_for_timeout(200)
    assert all("Content Security Policy" in complaint for complaint in opened.complaints)
    for directive in ("img-src", "connect-src|default-src"):
        assert any(re.search(directive, complaint) for complaint in opened.complaints), opened.complaints
