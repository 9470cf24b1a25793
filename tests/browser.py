"""A page in headless Chromium, for tests and for the pictures in docs/.

    python tests/browser.py ADDRESS page.png --until 'document.images.length > 3'

Speaks the DevTools protocol over the browser's pipe (messages that end in NUL, on its file descriptors 3 and
4), so it needs nothing but the browser.  https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# A container has no sandbox for the browser and little /dev/shm; it must not phone home or look for updates.
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--mute-audio",
    "--no-default-browser-check",
    "--no-first-run",
    "--no-proxy-server",
    "--password-store=basic",
    "--remote-debugging-pipe",
)
# MLflow 3.17 opens its assistant on the first visit; it takes a quarter of the page.  about:blank has no
# storage.
NO_ASSISTANT = "try { localStorage['mlflow.assistant.fab.autoOpenedOnFirstLoad_v1'] = 'true' } catch {}"
# The images that can be seen somewhere on the page, and whether each has arrived.
IMAGES = "[...document.images].filter(image => image.getClientRects().length)"


def find_browser() -> str | None:
    """The first Chromium or Chrome on PATH."""
    return next((found for program in PROGRAMS if (found := shutil.which(program))), None)


class Browser:
    """One page of a browser of its own, with a profile that is deleted afterwards.

    with Browser(1600, 1200) as page:
        page.open("http://127.0.0.1:5000")
        page.wait_for("document.images.length > 3")
        page.screenshot(Path("page.png"))
    """

    def __init__(self, width: int = 1600, height: int = 1200, scale: float = 1.0, first: str = "") -> None:
        """`scale`: pixels of a picture for each of the page.

        `first`: JavaScript that runs in each page before the page's own.  Raises FileNotFoundError if there
        is no browser.
        """
        program = find_browser()
        if program is None:
            raise FileNotFoundError(f"none of these programs is on PATH: {', '.join(PROGRAMS)}")
        self._number = 0
        self._session: str | None = None
        self._received = b""
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        out, self._to = os.pipe()
        self._from, into = os.pipe()

        def as_3_and_4() -> None:
            # By way of numbers above 4, since either pipe may have got 3 or 4.
            reading, writing = fcntl.fcntl(out, fcntl.F_DUPFD, 10), fcntl.fcntl(into, fcntl.F_DUPFD, 10)
            os.dup2(reading, 3)
            os.dup2(writing, 4)

        command = [
            program,
            *FLAGS,
            f"--user-data-dir={self._profile.name}",
            f"--window-size={width},{height}",
            "about:blank",
        ]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command,
            pass_fds=(3, 4),
            preexec_fn=as_3_and_4,
            stdin=quiet,
            stdout=quiet,
            stderr=quiet,
            start_new_session=True,
        )
        os.close(out)
        os.close(into)
        try:
            target = self.command("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.command("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            self.command(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=scale,
                mobile=False,
            )
            self.command("Page.enable")
            self.command("Page.addScriptToEvaluateOnNewDocument", source=first)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser, its helper processes with it."""
        with contextlib.suppress(OSError, RuntimeError, TimeoutError, EOFError):
            self._session = None
            self.command("Browser.close", seconds=5)
        os.close(self._to)
        os.close(self._from)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()
        self._profile.cleanup()

    def command(self, method: str, seconds: float = 30.0, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol; events that arrive meanwhile are dropped.

        Raises RuntimeError with the browser's words if it refuses, TimeoutError, or EOFError if the browser
        has died.
        """
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + seconds
        while True:
            answer = self._receive(until, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self, until: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._received:
            if not select.select([self._from], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"{method}: no answer from the browser")
            if not (some := os.read(self._from, 1 << 20)):
                raise EOFError(f"{method}: the browser has ended")
            self._received += some
        text, _, self._received = self._received.partition(b"\0")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def open(self, url: str) -> None:
        """Load a page afresh, also if only the part behind # differs."""
        self.command("Page.navigate", url="about:blank")
        if text := self.command("Page.navigate", url=url).get("errorText"):
            raise RuntimeError(f"{url}: {text}")
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, a promise awaited; anything that JSON can hold."""
        answer = self.command("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(
                f"{script}: {details.get('exception', {}).get('description', details['text'])}"
            )
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = 30.0) -> Any:
        """The value of the expression as soon as it is truthy.

        Raises TimeoutError with what the page shows instead.
        """
        until = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            if time.monotonic() > until:
                raise TimeoutError(f"{seconds:g} s without {script}; the page says: {self.text()[:2000]}")
            time.sleep(0.1)
        return value

    def text(self) -> str:
        """What the page says, as a reader sees it."""
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def settle(self, seconds: float = 30.0) -> None:
        """Wait until all images have arrived and the page has not changed for a second."""
        state = f"[document.body.innerText, {IMAGES}.map(image => image.complete)]"
        until, before, since = time.monotonic() + seconds, None, time.monotonic()
        while time.monotonic() < until:
            now = self.evaluate(state)
            if now != before:
                before, since = now, time.monotonic()
            elif time.monotonic() - since > 1 and all(now[1]):
                return
            time.sleep(0.1)
        raise TimeoutError(f"the page still changes after {seconds:g} s")

    def screenshot(self, path: Path) -> None:
        """The window as a PNG."""
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))


def main() -> None:
    parser = argparse.ArgumentParser(description="A screenshot of a page in headless Chromium.")
    parser.add_argument("url")
    parser.add_argument("output", type=Path)
    parser.add_argument("--size", default="1600x1200", help="of the window (1600x1200)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="pixels of the picture for each of the page (1)"
    )
    parser.add_argument(
        "--first",
        default=NO_ASSISTANT,
        help="JavaScript run before the page's own (closes MLflow's assistant)",
    )
    parser.add_argument(
        "--until",
        default="document.body.innerText",
        help="JavaScript that is true once the page is there (then it waits until it stands still)",
    )
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    with Browser(width, height, arguments.scale, arguments.first) as page:
        page.open(arguments.url)
        page.wait_for(arguments.until, 60)
        page.settle(60)
        page.screenshot(arguments.output)


if __name__ == "__main__":
    sys.exit(main())
