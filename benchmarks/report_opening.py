"""How long an HTML report takes to open in a headless Chromium, beside a page that holds nothing but plotly.

    python -m benchmarks.report_opening report.html [ROUNDS]

The two pages are opened in turns, each time in a new browser with an empty profile. Times are the page's own
(performance.now, from the beginning of navigation): the document read (DOMContentLoaded), the charts in sight drawn,
and all charts drawn, as for printing. Processor time is that of all processes of the browser, and says what a busy
machine does not change. Needs a Chromium and psutil.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from badam.profiling.machine import provenance

RECORD = Path(__file__).parent / "results" / "report_opening.json"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--window-size=1400,900", "--remote-debugging-port=0",
)  # fmt: skip
LONGEST_SECONDS = 90

# Told to the page around, which no content policy forbids to pass it on.
PROBE = """
<script>
(async () => {
  const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
  const root = document.documentElement;
  while (!root.dataset.charts) await pause(5);
  const seen = performance.now();
  dispatchEvent(new Event("beforeprint"));
  while (document.querySelector(".chart:not([data-drawn])")) await pause(5);
  const all = performance.now();
  const read = performance.getEntriesByType("navigation")[0].domContentLoadedEventEnd;
  parent.postMessage({read, seen, all}, "*");
})();
</script>
"""
FRAME = """<body style="margin:0"><iframe src="page" style="border:0;width:1400px;height:900px"></iframe>
<script>
addEventListener("message", (event) => fetch("answer", {method: "POST", body: JSON.stringify(event.data)}));
</script></body>"""


@dataclass(frozen=True, slots=True)
class Opening:
    """One page opened once, or the medians of several times."""

    read_milliseconds: float
    seen_milliseconds: float  # with the charts that are in sight
    all_milliseconds: float
    processor_seconds: float


class Site(ThreadingHTTPServer):
    """Serves a frame and a page in it on this machine, and takes the page's answer."""

    def __init__(self, page: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.contents = {"/": FRAME.encode(), "/page": page.replace("</body>", f"{PROBE}</body>").encode()}
        self.answer: dict[str, float] = {}
        self.answered = threading.Event()


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        content = self.server.contents.get(self.path)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(content or b"")

    def do_POST(self) -> None:
        self.server.answer = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.answered.set()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def open_once(page: str) -> Opening:
    """Open ``page`` in a new browser."""
    site = Site(page)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        assert CHROMIUM is not None, "asked before"
        browser = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"http://127.0.0.1:{site.server_port}/"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            if not site.answered.wait(LONGEST_SECONDS):
                sys.exit(f"The page did not answer within {LONGEST_SECONDS} s.")
            seconds = _processor_seconds(psutil.Process(browser.pid))
        finally:
            browser.terminate()
            browser.wait()
            site.shutdown()
    return Opening(site.answer["read"], site.answer["seen"], site.answer["all"], seconds)


def _processor_seconds(process: psutil.Process) -> float:
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def only_plotly(report: str) -> str:
    """The report's page without its charts and words: the library, unpacked by the same script."""
    head, figures = report.split('<script type="application/json" id="figures">')
    _, script = figures.split("</script>", 1)
    library = head[head.index('<script type="text/plain" id="library">') :]
    return f'<!doctype html><html><body>{library}<script type="application/json" id="figures">[]</script>{script}'


def _median(openings: list[Opening]) -> Opening:
    columns = zip(*(asdict(one).values() for one in openings), strict=True)
    return Opening(*(round(statistics.median(column), 3) for column in columns))


def main() -> None:
    """Open both pages in turns, print and write the medians."""
    if CHROMIUM is None:
        sys.exit("There is no Chromium on this machine.")
    report = Path(sys.argv[1]).read_text(encoding="utf-8")
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    pages = {"report": report, "plotly alone": only_plotly(report)}
    found: dict[str, list[Opening]] = {name: [] for name in pages}
    for _ in range(rounds):
        for name, page in pages.items():
            found[name].append(open_once(page))
            time.sleep(0.2)
    medians = {name: _median(openings) for name, openings in found.items()}
    for name, one in medians.items():
        print(
            f"{name:14} read {one.read_milliseconds:6.0f} ms  in sight {one.seen_milliseconds:6.0f} ms  "
            f"all drawn {one.all_milliseconds:6.0f} ms  processor {one.processor_seconds:5.2f} s"
        )
    least = min(found["report"], key=lambda one: one.seen_milliseconds)
    record = {
        "page_bytes": len(report.encode()),
        "charts": report.count('<div class="chart"'),
        "rounds": rounds,
        **{name.replace(" ", "_"): asdict(one) for name, one in medians.items()},
        "fastest_report": asdict(replace(least)),
        "processors": psutil.cpu_count(),
        "load_average": psutil.getloadavg()[0],
        "provenance": provenance(f"python -m benchmarks.report_opening report.html {rounds}").model_dump(),
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
