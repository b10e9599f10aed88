"""A headless Chromium driven over its own debugging protocol, by two pipes: no driver, no port, no package."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Backspace": 8, "Tab": 9, "Enter": 13, "1": 49, "2": 50, "3": 51}


def find_chromium() -> str:
    """Its path. Without one the test is skipped, unless GDRO_BROWSER_TEST=1 (as in CI) demands it."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    missing = "no chromium in PATH; expected one, e.g. `apt-get install chromium`"
    if os.environ.get("GDRO_BROWSER_TEST") == "1":
        pytest.fail(f"GDRO_BROWSER_TEST=1, but {missing}")
    pytest.skip(missing)


class Browser:
    """One page. `complaints` collects what its console says: exceptions, refused content, failed requests."""

    def __init__(self, profile: Path) -> None:
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4; above 9 ours cannot be in their way
        child = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (read, write)]
        command = f'exec "$@" 3<&{child[0]} 4>&{child[1]}'
        self._log = open(profile.with_suffix(".log"), "w")  # noqa: SIM115 (closed with the browser)
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", find_chromium(), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=child,
            stdout=self._log,
            stderr=self._log,
        )
        for fd in (read, write, *child):
            os.close(fd)
        self._buffer, self._sent, self._session = b"", 0, None
        self.complaints: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command of the protocol."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._sent:
            kind, said = answer.get("method"), answer.get("params", {})
            if kind == "Runtime.exceptionThrown":
                self.complaints.append(str(said["exceptionDetails"].get("exception", said)))
            elif kind == "Log.entryAdded" and said["entry"]["level"] == "error":
                self.complaints.append(said["entry"]["text"])
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], 60)[0]:
                raise AssertionError("chromium said nothing for 60 s")
            data = os.read(self._read, 1 << 20)
            if not data:
                raise AssertionError(f"chromium ended; {self._log.name} says why")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page (a promise is awaited)."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> Any:
        """The expression's value once it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise AssertionError(f"never true: {script}; the page says: {self.run('document.body.innerText')!r}")
            time.sleep(0.02)
        return value

    def open(self, url: str) -> None:
        self.run("window.left = true")
        self.send("Page.navigate", url=url)
        self.wait("!window.left && document.readyState === 'complete'")

    def press(self, key: str) -> None:
        """Press and release a key, as a keyboard does."""
        code = f"Digit{key}" if key.isdigit() else key
        params = {"key": key, "code": code, "windowsVirtualKeyCode": KEYS[key]}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **params)
        self.send("Input.dispatchKeyEvent", type="keyUp", **params)

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def look(self, width: int, height: int, *, dark: bool = False, touch: bool = False) -> None:
        """Change the window, the color scheme and the kind of pointer."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def shoot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._log.close()
