"""A headless Chromium for the tests: opens a page, runs a script in it, returns what the script says."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--enable-logging=stderr", "--virtual-time-budget=20000",
)  # fmt: skip

# Waits until the charts are drawn, runs the test's script and tells its answer to the page around.
PROBE = """
<script>
(async () => {
  const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
  while (!document.documentElement.dataset.charts) await pause(20);
  const answer = await (async () => { %s })();
  parent.postMessage(JSON.stringify(answer), "*");
})();
</script>
"""

# A headless window is never narrower than 500 pixels; a frame is.
FRAME = """
<body style="margin:0"><iframe src="%s" style="border:0;width:%dpx;height:%dpx"></iframe>
<script>
addEventListener("message", (event) => {
  const place = document.createElement("pre");
  place.id = "answer";
  place.textContent = event.data;
  document.body.append(place);
});
</script></body>
"""


@dataclass(frozen=True, slots=True)
class Visit:
    """What a page did in the browser."""

    answer: Any
    console: tuple[str, ...]  # lines that the page wrote to its console, errors included


def visit(page: Path, script: str, *, width: int = 1000, height: int = 9000, dark: bool = False) -> Visit:
    """Open ``page`` and run ``script``, the body of an async function, in a frame of so many CSS pixels.

    By default all of the page is in sight. A frame of a local file sees no further than its edges.
    """
    probed, frame = page.with_name(f"probed-{page.name}"), page.with_name(f"frame-{page.name}")
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{PROBE % script}</body>"), encoding="utf-8")
    frame.write_text(FRAME % (probed.name, width, height), encoding="utf-8")
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={page.parent / 'profile'}",
            f"--window-size={max(width, 500)},{height}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--dump-dom",
            frame.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the page did not answer: {done.stdout[-500:]} {done.stderr[-2000:]}"
    console = tuple(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
    return Visit(json.loads(html.unescape(found.group(1))), console)
