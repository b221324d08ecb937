"""A real, headless Chromium, driven over its DevTools pipe: what a page draws, says and logs."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One page of one browser; `log` is what its console and its policies had to say."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 900):
        """Start Chromium with an empty profile. It is ended on the way out of a `with`."""
        to_browser, ours_out = os.pipe()
        ours_in, from_browser = os.pipe()
        # Chromium reads commands from its file 3 and writes to its file 4. A shell puts them there; dash, whose numbers
        # of files have one digit, cannot.
        command = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        options = [*_OPTIONS, f"--window-size={width},{height}", f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", str(CHROMIUM), *options, "about:blank"],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._out, self._in = os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb")
        self._number, self._session, self._rest, self._events = 0, None, b"", []
        self.log: list[str] = []

    def __enter__(self) -> "Browser":
        try:
            (target,) = [one for one in self._call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
            found = self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
            self._session = found["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self._call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        for pipe in (self._out, self._in):
            with contextlib.suppress(OSError):
                pipe.close()

    def open(self, path: Path) -> None:
        """Load a file and wait until its script says that all is drawn."""
        self._call("Page.navigate", url=path.as_uri())
        self.run("""new Promise((done) => {
            const look = () => document.body?.dataset.ready ? done() : setTimeout(look, 20); look(); })""")

    def run(self, script: str) -> Any:
        """Return what an expression gives in the page, as plain values; promises are waited for."""
        found = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def show(self, width: int, height: int = 900, scheme: str = "light") -> None:
        """Give the page a size and a colour scheme, and a moment to follow."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.run("new Promise((done) => setTimeout(done, 400))")

    def wait(self, condition: str) -> None:
        """Wait until an expression holds: charts follow a new size when they come to it."""
        self.run(f"""new Promise((done) => {{
            const look = () => {condition} ? done() : setTimeout(look, 20); look(); }})""")

    def press(self, key: str) -> None:
        """Press a key, such as Tab."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=9)

    def picture(self, is_whole: bool = False) -> bytes:
        """Return a PNG of what is seen, or of the whole page."""
        return base64.b64decode(self._call("Page.captureScreenshot", captureBeyondViewport=is_whole)["data"])

    def pdf(self) -> bytes:
        """Print the page on A4."""
        return base64.b64decode(self._call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)["data"])

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            got = os.read(self._in.fileno(), 1 << 20)
            assert got, "Chromium has ended"
            self._rest += got
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def _note(self, event: dict[str, Any]) -> None:
        """Keep what a console would show, and every request that is not for the file itself."""
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.consoleAPICalled":
                self.log.append(" ".join(str(one.get("value", one.get("description"))) for one in params["args"]))
            case "Runtime.exceptionThrown":
                self.log.append(str(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.log.append(params["entry"]["text"])
            case "Network.requestWillBeSent" if not params["request"]["url"].startswith(("file:", "data:")):
                self.log.append(params["request"]["url"])
