"""Screenshots of the built site in Chromium, at the width of a desktop and of a phone.

    make docs
    python docs/tools/pictures.py build/site docs/pictures/pages index numerics reproduction

writes NAME-desktop.png and NAME-phone.png, from the top of each page down to `--height`, and prints
the height of each page and whether anything in it is wider than the screen. Without names it
takes all pages. It needs Chromium (`--browser`) and Pillow; no network.
"""

from __future__ import annotations

import argparse
import html
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTHS = {"desktop": 1280, "phone": 390}
FRAME = """<!doctype html><meta charset="utf-8"><style>body {{ margin: 0 }}
iframe {{ border: 0; display: block; width: {width}px; height: {height}px }}</style>
<iframe src="{page}"></iframe><p></p><script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument, width = {width};
  const scrolls = e => e && (/auto|scroll/.test(getComputedStyle(e).overflowX)
    || scrolls(e.parentElement));
  const wide = [...page.querySelectorAll("article *")].filter(
    e => e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement));
  const names = wide.map(e => e.tagName + " " + e.textContent.slice(0, 40));
  document.querySelector("p").textContent = JSON.stringify(
    [page.documentElement.scrollHeight, names]);
}});
</script>
"""
"""A window of Chromium is at least 500 pixels wide, so a phone is a frame inside it."""


def look(browser: str, page: Path, width: int, height: int, picture: Path | None = None) -> str:
    """Load a page; returns its measures in the frame, and takes a picture if a path is given."""
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        source = html.escape(page.resolve().as_uri())
        frame.write_text(FRAME.format(width=width, height=height, page=source))
        command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", "--disable-gpu"]
        command += ["--allow-file-access-from-files", f"--user-data-dir={folder}/profile"]
        command += [f"--window-size={max(width, 500)},{height}", "--virtual-time-budget=3000"]
        shot = Path(folder) / "shot.png"
        command += [f"--screenshot={shot}" if picture else "--dump-dom", frame.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
        if picture:
            with Image.open(shot) as image:
                seen = image.convert("RGB").crop((0, 0, width, height))
            seen.quantize(128, dither=Image.Dither.NONE).save(picture, optimize=True)
    return done.stdout


def main() -> int:
    """Take the pictures; the exit status is 1 if a page is wider than its screen."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("site", type=Path, help="the built site")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("names", nargs="*", help="pages, such as numerics (default: all)")
    parser.add_argument("--height", type=int, default=1600, help="of a picture at most")
    parser.add_argument("--browser", default="chromium")
    options = parser.parse_args()
    pages = {p.parent.relative_to(options.site): p for p in options.site.rglob("index.html")}
    pages = {"index" if str(name) == "." else str(name): page for name, page in pages.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    status = 0
    for name in options.names or sorted(pages):
        for device, width in WIDTHS.items():
            dom = look(options.browser, pages[name], width, 1000)
            height, wide = re.search(r"<p>\[(\d+),(.*)\]</p>", dom).groups()
            picture = options.out / f"{name.replace('/', '-')}-{device}.png"
            look(options.browser, pages[name], width, min(int(height), options.height), picture)
            print(f"{picture}: {height} pixels tall; too wide: {html.unescape(wide)}")
            status |= wide != "[]"
    return status


if __name__ == "__main__":
    sys.exit(main())
