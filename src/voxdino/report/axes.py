"""What every chart shares: SVG elements with escaped text, numbers as words, and an axis with round ticks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, isclose, log10

from voxdino.report.texts import markup, plain

Pixels = int | float

NUM_COLOURS = 8  # classes c0 to c7 of the style sheet


def element(name: str, *content: str, **attributes: object) -> str:
    """An SVG element: content is markup already, attributes are escaped; `_` in a name stands for `-`."""
    told = "".join(f' {key.rstrip("_").replace("_", "-")}="{_told(value)}"' for key, value in attributes.items())
    return f"<{name}{told}>{''.join(content)}</{name}>"


def _told(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return markup(str(value))


def line(x1: Pixels, y1: Pixels, x2: Pixels, y2: Pixels, class_: str) -> str:
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def text(x: Pixels, y: Pixels, words: str, class_: str = "", anchor: str = "start") -> str:
    return element("text", markup(words), x=float(x), y=float(y), class_=class_, text_anchor=anchor)


def dot(x: Pixels, y: Pixels, radius: Pixels, class_: str, hint: str = "") -> str:
    """A filled circle; `hint` appears when the mouse rests on it."""
    told = element("title", markup(hint)) if hint else ""
    return element("circle", told, cx=float(x), cy=float(y), r=float(radius), class_=class_)


def path(points: Iterable[tuple[Pixels, Pixels]], class_: str, *, closed: bool = False) -> str:
    steps = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return element("path", d=f"M{steps}{'Z' if closed else ''}", class_=class_)


def drawing(width: Pixels, height: Pixels, description: str, *content: str) -> str:
    """A whole SVG that scales with its place; `description` is what a screen reader says."""
    box = f"0 0 {width:.0f} {height:.0f}"
    return element("svg", *content, viewBox=box, width=float(width), role="img", aria_label=description)


def shorten(words: str, width: Pixels, size: Pixels = 7.0) -> str:
    """The words cut to `width` at about `size` pixels a letter, with an ellipsis."""
    room, words = max(3, int(width / size)), plain(words)
    return words if len(words) <= room else words[: room - 1].rstrip() + "…"


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` onto pixels from `start` to `end` (maybe before it); linear or logarithmic."""

    low: Pixels
    high: Pixels
    start: Pixels
    end: Pixels
    is_log: bool = False

    def place(self, value: Pixels) -> float:
        """The pixel of a value."""
        ends = (self.low, self.high, value)
        low, high, here = (log10(end) for end in ends) if self.is_log else ends
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def ticks(self, pixels_apart: Pixels) -> list[tuple[float, str]]:
        """(value, label) at round values, about `pixels_apart`."""
        most = max(3, int(abs(self.end - self.start) / pixels_apart))
        if self.is_log:
            return _log_ticks(self.low, self.high, most)
        step = round_step((self.high - self.low) / most)
        digits = max(0, -floor(log10(step)))
        if not isclose(step * 10**digits, round(step * 10**digits)):
            digits += 1
        first = ceil(self.low / step - 1e-9)
        values = [i * step for i in range(first, floor(self.high / step + 1e-9) + 1)]
        return [(value, f"{value + 0.0:.{digits}f}".replace("-", "−")) for value in values]


def axis_of(values: Sequence[float], start: Pixels, end: Pixels, *, is_log: bool = False, room: float = 0.06) -> Axis:
    """An axis over all values with some room at both ends; over a single value one around it."""
    low, high = min(values), max(values)
    if is_log:
        factor = (high / low) ** room if high > low else 2.0
        return Axis(low / factor, high * factor, start, end, is_log)
    extra = (high - low) * room or abs(high) * 0.1 or 1.0
    return Axis(low - extra, high + extra, start, end)


def round_step(size: float) -> float:
    """The smallest of 1, 2, 5, 10 ... times a power of ten that is not below `size`."""
    power = 10.0 ** floor(log10(size))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= size * (1 - 1e-9))


def _log_ticks(low: Pixels, high: Pixels, most: int) -> list[tuple[float, str]]:
    """Powers of ten, with 2 and 5 between them where there is room."""
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        values = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if len(values) <= most:
            break
    return [(value, f"{value:,.0f}".replace(",", " ") if value >= 1 else f"{value:g}") for value in values]
