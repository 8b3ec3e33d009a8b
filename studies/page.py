"""A page in one file, its pictures inside, which needs no network: the HTML and the PNGs of studies.report."""

import base64
import html
import io
import re
import warnings

import numpy as np
from PIL import Image

from data.pictures import printable

STYLE = """
:root { color-scheme: light dark; --line: #8884 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem }
h1, h2, h3, p { overflow-wrap: anywhere }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
table { border-collapse: collapse; margin: .5rem 0; display: block; overflow-x: auto }
td, th { text-align: left; padding: .15rem .6rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
pre { overflow-x: auto; padding: .5rem; border: 1px solid var(--line) }
.row { display: flex; flex-wrap: wrap; gap: 1rem }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem }
.wide { overflow-x: auto }
.wide img { max-width: none }
figure { margin: 0; font-size: .85rem; overflow-wrap: anywhere }
.bar { display: flex; justify-content: space-between; gap: .5rem; margin: 1px 0; padding: 0 .3rem }
.bar { background: linear-gradient(90deg, #48c8 var(--share), #8882 0) }
.bar span:first-child { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden }
.bar span:last-child { white-space: nowrap }
.true { font-weight: bold }
@media print { section { break-inside: avoid } }
"""


# ---------------------------------------------------------------------------------------------- HTML


def document(title: str, content: str) -> str:
    title = escape(title)
    return ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
            f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{content}\n</body>\n"
            "</html>\n")


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>\n"


def heading(title: str) -> str:
    """Within a section."""
    return f"<h3>{escape(title)}</h3>\n"


def escape(text: str) -> str:
    return html.escape(printable(text))


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>\n"


def table(head: list[str] | None, rows: list[list[str]]) -> str:
    """A table of text."""
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>\n" if head else ""
    below = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f"<table>{top}{below}</table>\n"


def row(parts: list[str]) -> str:
    """Pictures next to each other, as many as the window has room for."""
    return f'<div class="row">{"".join(parts)}</div>\n'


def cards(parts: list[str]) -> str:
    """Cards in columns, as many as the window has room for."""
    return f'<div class="cards">{"".join(parts)}</div>\n'


def card(picture: str, caption: str, more: str = "") -> str:
    """A picture with its caption; `more` is HTML."""
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption>{more}</figure>\n"


def bar(name: str, share: float, bold: bool) -> str:
    """A name on a bar of a length, 0 to 1, which is written out, too; a name of more than two lines is cut, and
    whole as a tooltip."""
    return (f'<div class="{"bar true" if bold else "bar"}" style="--share: {100 * share:.1f}%" title="{escape(name)}">'
            f"<span>{escape(name)}</span><span>{100 * share:.1f}%</span></div>\n")


def wide(picture: str) -> str:
    """A picture that would be too small to read on a narrow screen: it can be moved there."""
    return f'<div class="wide">{picture}</div>\n'


# ---------------------------------------------------------------------------------------------- pictures


def image(data: bytes, kind: str, name: str, words: str) -> str:
    """A picture's file in the page. name: what it is called there, letters, digits and dashes; words: what it shows."""
    return (f'<img id="{name}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}" '
            f'alt="{escape(words)}"/>\n')


def images(content: str) -> dict[str, bytes]:
    """The pictures of a page by the names of their files."""
    found = re.findall(r'<img id="([\w-]+)" src="data:image/(\w+);base64,([^"]*)"', content)
    return {f"{name}.{kind}": base64.b64decode(data) for name, kind, data in found}


def picture(pixels: np.ndarray, name: str, words: str) -> str:
    """Pixels (h, w, 3) uint8 in the page."""
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(data, "PNG")
    return image(data.getvalue(), "png", name, words)


def drawing(figure, name: str, words: str) -> str:
    """A figure of matplotlib's in the page."""
    data = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of letters that its font lacks
        figure.savefig(data, format="png", dpi=90)
    return image(data.getvalue(), "png", name, words)


def moving(frames: list[np.ndarray], name: str, words: str, milliseconds: int = 300) -> str:
    """Frames (h, w, 3) uint8 in the page, one after the other, again and again."""
    first, *rest = map(Image.fromarray, frames)
    data = io.BytesIO()
    first.save(data, "WEBP", save_all=True, append_images=rest, duration=milliseconds, loop=0, lossless=True)
    return image(data.getvalue(), "webp", name, words)


def fitted(pixels: np.ndarray, side: int) -> np.ndarray:
    """A picture (h, w, 3) in a square of `side` pixels, on grey where it is not square."""
    height, width = pixels.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = Image.Resampling.NEAREST if scale > 1.5 else Image.Resampling.LANCZOS
    square = Image.new("RGB", (side, side), (128, 128, 128))
    square.paste(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, how),
                 ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(square)


def grid(tiles: list[np.ndarray], across: int, scale: int = 1, gap: int = 2) -> np.ndarray:
    """Pictures of one size, `across` in a row, on white."""
    height, width = tiles[0].shape[0] * scale, tiles[0].shape[1] * scale
    down, across = -(-len(tiles) // across), min(across, len(tiles))
    out = np.full((down * (height + gap) - gap, across * (width + gap) - gap, 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // across * (height + gap), number % across * (width + gap)
        out[top : top + height, left : left + width] = tile.repeat(scale, 0).repeat(scale, 1)
    return out
