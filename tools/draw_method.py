"""Draw the picture of the method in docs/glossary.md: a small example, from relevance to the rest.

    python tools/draw_method.py

All numbers follow from those below. The picture is narrow, so that a phone shows it whole.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

PICTURE = Path(__file__).parents[1] / "docs/images/method.svg"
WEIGHT = (1.0, 0.5, 1.0, 1.0)  # of the channel, for four input channels
POOLED = {"clocks": (8.0, 6.0, 2.0, 0.0), "cauliflowers": (0.0, 2.0, 3.0, 7.0)}  # class means
MASKS = ((1.0, 0.7, 0.2, 0.0), (0.0, 0.1, 0.8, 1.0))
GRADIENT, POSITIVE = 0.2, 52.0  # of the logit; all positive relevance in the layer, of a clock
TAU, P, GAMMA = 0.03, 0.75, 0.5

WIDTH, MARGIN = 380, 14
COLOURS = {"clocks": "#00796b", "cauliflowers": "#e64a19", "rest": "#757575", "whole": "#37474f"}
SIZE, LINE = 14, 19  # of text, in pixels of the picture


def relevance(name: str) -> list[float]:
    """What each input channel adds to the channel on average: the class's ARV."""
    return [w * s for w, s in zip(WEIGHT, POOLED[name], strict=True)]


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """How alike two ARVs are."""
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / (math.hypot(*one) * math.hypot(*other))


def parts() -> dict[str, list[float]]:
    """Divide the weights: the rows of both concept channels and of the rest channel."""
    rows = [[m * w for m, w in zip(mask, WEIGHT, strict=True)] for mask in MASKS]
    rest = [w - sum(own) for w, *own in zip(WEIGHT, *rows, strict=True)]
    return dict(zip((*POOLED, "rest"), (*rows, rest), strict=True))


def responses(name: str) -> dict[str, float]:
    """What the whole channel, its concept channels and the rest give to a class on average."""
    pooled = POOLED[name]
    rows = {"whole": list(WEIGHT), **parts()}
    return {k: sum(w * s for w, s in zip(row, pooled, strict=True)) for k, row in rows.items()}


class Canvas:
    """SVG from top to bottom."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.y = 8.0
        self._drawn: list[str] = []

    def text(self, x: float, words: str, colour: str = "#263238", **more: str) -> None:
        """Write at the present height."""
        extra = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
        words = html.escape(words)
        self._drawn.append(f'<text x="{x:g}" y="{self.y:g}" fill="{colour}"{extra}>{words}</text>')

    def lines(self, *lines: str) -> None:
        """Write lines below each other."""
        for line in lines:
            self.y += LINE
            self.text(MARGIN, line)

    def bold(self, line: str) -> None:
        """Write a line that counts."""
        self.y += LINE
        self.text(MARGIN, line, font_weight="bold")

    def head(self, words: str) -> None:
        """Begin a step."""
        self.y += 16
        self._drawn.append(f'<path d="M{MARGIN} {self.y:g}H{WIDTH - MARGIN}" stroke="#cfd8dc"/>')
        self.y += 24
        self.text(MARGIN, words, font_weight="bold", font_size="15")

    def bar(self, x: float, width: float, colour: str, height: float = 13) -> None:
        """Draw a bar at the present line of text."""
        box = f'x="{x:g}" y="{self.y - 11:g}" width="{width:g}" height="{height:g}"'
        self._drawn.append(f'<rect {box} fill="{colour}"/>')

    def svg(self) -> str:
        """The whole picture."""
        height = self.y + 16
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
            f'width="{WIDTH}" height="{height:g}" font-family="sans-serif" font-size="{SIZE}">\n'
            f'<rect width="{WIDTH}" height="{height:g}" rx="6" fill="#fff"/>\n'
            + "\n".join(self._drawn)
            + "\n</svg>\n"
        )


def draw() -> str:
    """Draw the five steps."""
    canvas = Canvas()
    arvs = {name: relevance(name) for name in POOLED}
    whole = sum(arvs["clocks"])
    canvas.lines(
        "An example with made-up numbers: one channel", "with four input channels, A to D."
    )
    _ask_for_relevance(canvas, whole)
    _compare(canvas, arvs)
    _divide(canvas)
    _respond(canvas)
    return canvas.svg()


def _ask_for_relevance(canvas: Canvas, whole: float) -> None:
    told = whole * GRADIENT
    canvas.head("1  Relevance: does the channel matter?")
    canvas.lines(
        "In images of clocks, on average:",
        f"response {whole:g} times gradient {GRADIENT:g} = relevance {told:g}",
        f"share = {told:g} of {POSITIVE:g} in the layer = {told / POSITIVE:.2f}",
    )
    canvas.bold(f"At least tau = {TAU:g}: yes.")
    canvas.lines(
        "Clocks use the channel if this holds in at least",
        f"p = {P:.0%} of their images. Cauliflowers use it, too.",
    )


def _compare(canvas: Canvas, arvs: dict[str, list[float]]) -> None:
    canvas.head("2  ARV: through which inputs?")
    canvas.lines("weight times pooled input, mean over the class")
    canvas.y += 4
    first, half = MARGIN + 22, 176
    canvas.y += LINE
    for n, name in enumerate(arvs):
        canvas.text(first + n * half, name, COLOURS[name], font_weight="bold")
    for i, letter in enumerate("ABCD"):
        canvas.y += LINE
        canvas.text(MARGIN, letter)
        for n, (name, values) in enumerate(arvs.items()):
            x, width = first + n * half, values[i] * 14
            canvas.bar(x, max(width, 1), COLOURS[name])
            canvas.text(x + width + 5, f"{values[i]:g}")
    canvas.head("3  Cosine: for the same reason?")
    alike = cosine(*arvs.values())
    canvas.lines(f"cosine of the two ARVs = {alike:.2f}")
    canvas.bold(f"Below gamma = {GAMMA:g}: two concepts.")


def _divide(canvas: Canvas) -> None:
    canvas.head("4  Masks: who gets which weight?")
    canvas.lines(
        "A mask says what part of each weight to keep.",
        "Bars are the weights, colours their parts.",
    )
    canvas.y += 4
    columns = {"clocks": ("mask 0", 186), "cauliflowers": ("mask 1", 252), "rest": ("rest", 320)}
    canvas.y += LINE
    canvas.text(MARGIN, "weight", COLOURS["whole"], font_weight="bold")
    for name, (title, x) in columns.items():
        canvas.text(x, title, COLOURS[name], font_weight="bold")
    rows = parts()
    for i, letter in enumerate("ABCD"):
        canvas.y += LINE
        canvas.text(MARGIN, letter)
        x = MARGIN + 22.0
        for name, row in rows.items():
            canvas.bar(x, row[i] * 110, COLOURS[name])
            x += row[i] * 110
        canvas.text(x + 4, f"{WEIGHT[i]:g}")
        for name, (_, x) in columns.items():
            canvas.text(x, f"{abs(rows[name][i] / WEIGHT[i]):.1f}", COLOURS[name])


def _respond(canvas: Canvas) -> None:
    canvas.head("5  Responses: what does each part give?")
    canvas.lines("On average, to images of")
    canvas.y += 4
    columns = (176, 252)
    canvas.y += LINE
    for x, name in zip(columns, POOLED, strict=True):
        canvas.text(x, name, COLOURS[name], font_weight="bold")
    told = {name: responses(name) for name in POOLED}
    titles = {
        "clocks": "concept channel 0",
        "cauliflowers": "concept channel 1",
        "rest": "rest channel",
        "whole": "sum: the channel",
    }
    for part, title in titles.items():
        canvas.y += LINE
        bold = {"font_weight": "bold"} if part == "whole" else {}
        canvas.text(MARGIN, title, COLOURS[part], **bold)
        for x, name in zip(columns, POOLED, strict=True):
            canvas.text(x, f"{told[name][part]:.1f}", COLOURS[part], **bold)
    canvas.y += 4
    canvas.lines(
        "The sum is the original channel, whatever the",
        "masks are: the rest takes up what they leave.",
        "So the outputs stay the same.",
    )


if __name__ == "__main__":
    PICTURE.write_text(draw())
