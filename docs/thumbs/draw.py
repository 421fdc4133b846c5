"""python docs/thumbs/draw.py RUN PHOTO RESULTS [--data-path DATA]

Draw the thumbnails of the README's table of tools from what the tools make of a finished run, a photo and a folder of
runs (report.png needs chromium). Those in the tree show BLM+ on the flowers after ten epochs: the first run of
tools/sweep/grids/study.yaml with padding trained.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
SIZE = (560, 280)
MOST_BYTES = 25_000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("photo", metavar="PHOTO")
    parser.add_argument("results", metavar="RESULTS")
    parser.add_argument("--data-path", default="datasets")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run = shutil.copytree(args.run, Path(place) / "run")
        data = ["--data-path", args.data_path]
        save("evaluate", as_text(tool("evaluate", run, *data)))
        save("predict", as_text(tool("predict", run, shutil.copy(args.photo, place)).replace(f"{place}/", "")))
        tool("visualize", run, *data)
        figures = (Image.open(run / "figures" / f"{name}.png") for name in ("pattern", "outputs"))
        save("visualize", stacked(*figures))
        tool("report", args.results, "--out", Path(place) / "report.html")
        shot = Path(place) / "report.png"
        window = ["--window-size=1280,640", f"--user-data-dir={place}/browser", f"--screenshot={shot}"]
        page = (Path(place) / "report.html").as_uri()
        subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", *window, page], check=True)
        save("report", Image.open(shot))


def tool(name, *arguments):
    """What ``python -m tools.NAME`` prints."""
    command = [sys.executable, "-m", f"tools.{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=HERE.parents[1], check=True, capture_output=True, text=True).stdout


def as_text(printed):
    """The upper left corner of a terminal."""
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono"), 15)
    image = Image.new("RGB", SIZE, "white")
    lines = "\n".join(line if "  " in line else textwrap.fill(line, 58) for line in printed.splitlines())
    ImageDraw.Draw(image).multiline_text((12, 10), lines, "black", font, spacing=4)
    return image


def stacked(*images):
    sheet, top = Image.new("RGB", SIZE, "white"), 0
    for image in images:
        image.thumbnail((SIZE[0], SIZE[1] - top))
        sheet.paste(image, ((SIZE[0] - image.width) // 2, top))
        top += image.height
    return sheet


def save(name, image):
    """With as many colours as fit into the bytes."""
    path, image = HERE / f"{name}.png", image.convert("RGB").resize(SIZE, Image.Resampling.LANCZOS)
    for colours in (64, 32, 16, 8):
        image.quantize(colours).save(path, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            return
    raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {MOST_BYTES}")


if __name__ == "__main__":
    main()
