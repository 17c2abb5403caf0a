"""A headless chromium for the pages of reports; tests that need it are skipped where none is installed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

QUIET = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
QUIET += ("disable-component-update", "disable-sync", "disable-dev-shm-usage", "hide-scrollbars")


def missing() -> str:
    """Why there is no browser here; empty where there is one."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: apt-get install chromium chromium-driver)"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed (pip install -e '.[test]')"
    return ""


needs_browser = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser")


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """A WebDriver of a fresh profile. Both programs are named, so that Selenium looks for neither in the network."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for word in ("headless=new", *QUIET, f"user-data-dir={profile}"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=str(shutil.which("chromedriver"))))
    try:
        yield driver
    finally:
        driver.quit()


def resize(driver: Any, width: int, height: int = 900) -> None:
    """The width of the page itself: a headless window has a least width that is more than a phone's."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def read_through(driver: Any) -> None:
    """Scrolls from top to bottom as a reader does, so that every chart gets drawn."""
    driver.execute_async_script(
        """
        const done = arguments[0];
        let top = 0;
        const next = () => {
          window.scrollTo(0, top);
          top += 400;
          if (top > document.documentElement.scrollHeight) setTimeout(() => { window.scrollTo(0, 0); done(); }, 300);
          else setTimeout(next, 60);
        };
        next();
        """
    )


def complaints(driver: Any) -> list[str]:
    """What the console says that is an error or a warning."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def requests(driver: Any) -> list[str]:
    """The addresses that the page asked for."""
    import json

    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
