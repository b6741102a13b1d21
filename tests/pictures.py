"""Pictures of a single pixel: drawing takes a second, longer than the small runs whose pages show them."""

import base64
from pathlib import Path

from minillm.reports import summary, watch

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABh6FO1AAAAABJRU5ErkJggg=="
)


def draw_pixel(rows, path, **_) -> list[bytes]:
    """Write the pixel, and return it as the only panel."""
    Path(path).write_bytes(PIXEL)
    return [PIXEL]


DRAWING = [(summary, "draw_curves", summary.draw_curves), (watch, "draw_monitor", watch.draw_monitor)]


def draw_pixels() -> None:
    """Replace what draws; ``draw`` puts it back."""
    for module, name, _ in DRAWING:
        setattr(module, name, draw_pixel)


def draw() -> None:
    """Let pictures be drawn again."""
    for module, name, function in DRAWING:
        setattr(module, name, function)
