"""Reports in a real browser: charts are drawn, tables sort, nothing complains and nothing leaves the machine."""

import statistics
import time

import pytest

from tests.report import synthetic
from tests.report.browser import browser, complaints, needs_browser, read_through, requests, resize
from trainkit.report import page

pytestmark = needs_browser


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def thirty(tmp_path_factory):
    """30 runs of 1,000 points: 10 groups of 3 seeds, two of them with the accuracies of a stream."""
    norms = ["pre", "post", "peri", "mix", "lns", "keel", "output", "ngpt", "hyper", "</script><b>evil"]
    sweep = synthetic.sweep(tmp_path_factory.mktemp("thirty") / "s", {"norm": norms, "seed": [0, 1, 2]}, steps=1000)
    synthetic.stream(sweep / "0")
    synthetic.stream(sweep / "3")
    return page.of_directory(sweep).as_uri()


def charts(driver) -> list[dict]:
    """Every chart with its size and how many lines and cells are drawn in it."""
    return driver.execute_script(
        """
        return [...document.querySelectorAll('figure:not([hidden]) .chart')].map((chart) => {
          const plot = chart.querySelector('svg.main-svg'), box = plot?.getBoundingClientRect();
          return {
            title: chart.getAttribute('aria-label'), width: box?.width ?? 0, height: box?.height ?? 0,
            lines: chart.querySelectorAll('path.js-line').length, images: chart.querySelectorAll('.hm image').length,
          };
        });
        """
    )


def sideways(driver) -> int:
    """How many pixels the page is wider than the window."""
    return driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")


def column(driver, table: int, number: int) -> list[str]:
    script = "return [...document.querySelectorAll('table.sortable')[arguments[0]].tBodies[0].rows].map("
    return driver.execute_script(script + "(row) => row.cells[arguments[1]].textContent)", table, number)


@pytest.mark.parametrize("width", [1280, 390])
def test_every_chart_is_drawn_at_desktop_and_phone_width(driver, thirty, width):
    resize(driver, width)
    driver.get(thirty)
    assert driver.execute_script("return document.documentElement.dataset.ready") == "true"
    assert 0 < sum(chart["width"] > 0 for chart in charts(driver)) < len(charts(driver))  # not before they are near
    read_through(driver)
    drawn = charts(driver)
    assert len(drawn) == 2 + 3 + 10 + 2 + 1
    for chart in drawn:
        assert chart["height"] > 100, chart
        assert 200 < chart["width"] <= width, chart
        assert chart["lines"] + chart["images"] > 0, chart
    by_title = {chart["title"]: chart for chart in drawn}
    assert by_title["Validation loss"]["lines"] >= 10
    assert by_title["First logged step step 1"]["lines"] == 10
    assert by_title["norm=pre mean of 3 runs"]["images"] == 1
    assert sideways(driver) <= 0
    assert complaints(driver) == []
    abroad = [url for url in requests(driver) if not url.startswith(("file:", "data:", "blob:", "chrome:"))]
    assert abroad == []


def test_tables_sort_on_a_click_and_by_key(driver, thirty):
    resize(driver, 1280)
    driver.get(thirty)
    head = driver.find_element("xpath", "//section[@id='runs']//button[starts-with(., 'Validation loss')]")
    at = driver.execute_script("return arguments[0].closest('th').cellIndex", head)
    before = column(driver, 0, at)
    driver.execute_script("arguments[0].click()", head)
    up = column(driver, 0, at)
    assert up == sorted(before, key=float)
    head.send_keys("\n")
    assert column(driver, 0, at) == up[::-1] != up
    assert driver.execute_script("return arguments[0].closest('th').ariaSort", head) == "descending"
    run = driver.find_element("xpath", "//section[@id='runs']//button[.='run']")
    driver.execute_script("arguments[0].click()", run)
    assert column(driver, 0, 0) == [str(k) for k in range(30)]  # 10 after 9, and not after 1


def test_the_legend_hides_a_group_in_every_chart(driver, thirty):
    resize(driver, 1280)
    driver.get(thirty)
    read_through(driver)
    before = {chart["title"]: chart["lines"] for chart in charts(driver)}
    button = driver.find_element("css selector", "#legend button")
    driver.execute_script("arguments[0].click()", button)
    time.sleep(0.3)
    after = {chart["title"]: chart["lines"] for chart in charts(driver)}
    assert button.get_attribute("aria-pressed") == "false"
    assert after["Last logged step step 1,000"] == before["Last logged step step 1,000"] - 1
    assert set(before) - set(after) == {"norm=pre mean of 3 runs", "norm=pre"}  # its map and its accuracies
    assert complaints(driver) == []


def test_another_metric_and_another_measure_can_be_chosen(driver, thirty):
    resize(driver, 1280)
    driver.get(thirty)
    read_through(driver)
    choose = "arguments[0].value = [...arguments[0].options].find((o) => o.text === arguments[1]).value;"
    choose += "arguments[0].dispatchEvent(new Event('change')); arguments[0].scrollIntoView()"
    for id, text in (("measure", "Hidden variance"), ("metric", "Tokens per second")):
        driver.execute_script(choose, driver.find_element("id", id), text)
        time.sleep(0.5)
    assert driver.find_element("id", "blocks-title").text == "Hidden variance by depth"
    titles = {chart["title"]: chart for chart in charts(driver)}
    assert titles["Tokens per second tokens_per_second"]["lines"] >= 10
    assert complaints(driver) == []


def test_a_page_without_curves_says_so_and_complains_of_nothing(driver, tmp_path):
    (tmp_path / "sweep.json").write_text('{"jobs": []}')
    driver.get(page.of_directory(tmp_path).as_uri())
    assert driver.find_element("class name", "headline").text == "There are no runs here."
    assert charts(driver) == []
    assert complaints(driver) == []


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 10])
def test_300_runs_open_within_three_seconds(driver, tmp_path, seeds):
    words = {"norm": [f"n{k}" for k in range(300 // seeds)], "seed": list(range(seeds))}
    url = page.of_directory(synthetic.sweep(tmp_path, words, steps=1000)).as_uri()
    resize(driver, 1280)
    took = []
    for _ in range(3):
        driver.get("about:blank")
        driver.get(url)
        assert driver.execute_script("return document.documentElement.dataset.ready") == "true"
        took.append(
            driver.execute_script("return performance.timing.loadEventEnd - performance.timing.navigationStart")
        )
    assert statistics.median(took) <= 3000, took
    read_through(driver)
    assert all(chart["width"] > 0 for chart in charts(driver))
    assert complaints(driver) == []
