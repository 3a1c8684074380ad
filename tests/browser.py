"""Drive headless Chromium by the DevTools protocol over a pipe, for the tests of HTML pages."""

import base64
import json
import os
import select
import subprocess
from pathlib import Path

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
READ_FD, WRITE_FD = 3, 4  # of Chromium, with --remote-debugging-pipe; messages end with a NUL byte
TIMEOUT = 60  # seconds, for one answer


class Browser:
    """A running browser. profile: an empty folder."""

    def __init__(self, program: str, profile: Path):
        theirs_in, self.to = os.pipe()
        self.source, theirs_out = os.pipe()

        def place_pipes() -> None:
            spare = os.dup(theirs_out), os.dup(theirs_in)  # either may lie where the other is to be
            os.dup2(spare[1], READ_FD)
            os.dup2(spare[0], WRITE_FD)

        command = [program, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, preexec_fn=place_pipes, close_fds=False, **quiet)
        os.close(theirs_in)
        os.close(theirs_out)
        self.buffer, self.count, self.events = b"", 0, []

    def read_message(self) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.source], [], [], TIMEOUT)[0], "the browser does not answer"
            received = os.read(self.source, 2**16)
            assert received, "the browser has ended"
            self.buffer += received
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, session: str | None = None, **params) -> dict:
        """Return the answer to a call of the protocol; events that come before it are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.read_message()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, path: Path, width: int = 1200, height: int = 900, scheme: str = "light", script: bool = True):
        """Open a file in a new page and return it when it has loaded. script: run its JavaScript."""
        return Page(self, path, width, height, scheme, script)

    def close(self) -> None:
        self.call("Browser.close")
        self.process.wait(TIMEOUT)
        os.close(self.to)
        os.close(self.source)


class Page:
    """A page of the browser: Browser.open() returns it."""

    def __init__(self, browser: Browser, path: Path, width: int, height: int, scheme: str, script: bool):
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        scheme = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        while not self.list_events("Page.loadEventFired"):
            self.browser.events.append(self.browser.read_message())

    def call(self, method: str, **params) -> dict:
        return self.browser.call(method, self.session, **params)

    def list_events(self, method: str) -> list[dict]:
        """Return the parameters of all events of this page with this name."""
        own = (event for event in self.browser.events if event.get("sessionId") == self.session)
        return [event["params"] for event in own if event["method"] == method]

    def evaluate(self, expression: str):
        """Return the value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key, such as Enter or ArrowRight."""
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **text)

    def move_mouse(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def list_errors(self) -> list[str]:
        """Return the errors in the console and the exceptions so far."""
        self.evaluate("0")  # events come before the answer
        found = [str(one["exceptionDetails"]) for one in self.list_events("Runtime.exceptionThrown")]
        found += [str(one["args"]) for one in self.list_events("Runtime.consoleAPICalled") if one["type"] == "error"]
        return found + [one["entry"]["text"] for one in self.list_events("Log.entryAdded")]

    def list_requests(self) -> list[str]:
        """Return the addresses that the page has asked for, without the content of data: addresses."""
        return [one["request"]["url"].partition(",")[0] for one in self.list_events("Network.requestWillBeSent")]

    def measure_overflow(self) -> int:
        """Return by how many pixels the page is wider than the window."""
        return self.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def print_pdf(self) -> bytes:
        return base64.b64decode(self.call("Page.printToPDF")["data"])

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
