"""Draw docs/figures/report.png, the first screen of a run's page, as a browser shows it.

    ./scripts/align && python scripts/report_picture.py adapters

Needs Chromium and chromedriver. The page is that of the run, so it shows what the run's `report.html` says.
"""

import argparse
import base64
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from chromium import Browser  # noqa: E402

WIDTH, SCALE, COLOURS = 1000, 2, 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapters", type=Path, help="the adapter folder of a finished run")
    page = parser.parse_args().adapters / "run" / "report.html"
    with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
        browser.show(page, WIDTH)
        height = browser.run("return document.getElementById('before').getBoundingClientRect().top")
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": SCALE}
        shot = browser.cdp("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
    image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB").quantize(COLOURS)
    image.save(ROOT / "docs" / "figures" / "report.png", optimize=True)


if __name__ == "__main__":
    main()
