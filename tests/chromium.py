"""A headless Chromium driven through chromedriver's plain HTTP: no package, nothing but loopback."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = f"needs Chromium and chromedriver; found {CHROMIUM or 'no Chromium'} and {DRIVER or 'no chromedriver'}"
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --disable-dev-shm-usage"


class Browser:
    """One window; what it logs and asks for is kept. Close it, or use it in `with`."""

    def __init__(self, profile: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._driver = subprocess.Popen([DRIVER, f"--port={port}"], **quiet)
        self._url = f"http://127.0.0.1:{port}/session"
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        options = {"binary": CHROMIUM, "args": [*FLAGS.split(), f"--user-data-dir={profile}"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        asked = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": logs}}
        try:
            for attempt in range(100):
                try:
                    self._url += "/" + self._post("", {"capabilities": asked})["sessionId"]
                    break
                except urllib.error.HTTPError:
                    raise
                except urllib.error.URLError:
                    if attempt == 99:
                        raise
                    time.sleep(0.1)
        except BaseException:
            self._driver.kill()
            self._driver.wait()
            raise

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._open(urllib.request.Request(self._url, method="DELETE"), timeout=30).close()
        finally:
            self._driver.kill()
            self._driver.wait()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), method="POST")
        with self._open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def cdp(self, command: str, **options: Any) -> Any:
        """A command of Chromium's own protocol."""
        return self._post("/goog/cdp/execute", {"cmd": command, "params": options})

    def show(self, page: Path | str, width: int = 1280, dark: bool = False) -> None:
        """Open a file or an address at a width, light or dark."""
        mobile = width < 600
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])
        self._post("/url", {"url": page if isinstance(page, str) else page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """What a script, `return` and all, says about the page."""
        return self._post("/execute/sync", {"script": script, "args": []})

    def wait_for(self, script: str) -> Any:
        """What a script hands to its last argument, a function, when it is done."""
        return self._post("/execute/async", {"script": script, "args": []})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """Entries since it was last asked: `browser` for the console, `performance` for requests."""
        return self._post("/se/log", {"type": kind})

    def requests(self) -> list[str]:
        """Every address asked for since the log was last read, but for Chromium's own start page."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [r["request"]["url"] for r in sent if not r["documentURL"].startswith("chrome:")]

    def screenshot(self, path: Path) -> None:
        """The whole page."""
        shot = self.cdp("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
