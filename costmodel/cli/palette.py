"""The colours of all pictures: one for each tier, buffer and phase, the same in every picture.

Colours of one picture are at least as far apart as those of Okabe and Ito's palette, with normal
vision and for people who see no red, no green or no blue. All are visible on white and on black.
"""

from __future__ import annotations

# From the fastest tier to the slowest.
TIER_COLORS = {"gpu": "#C8401A", "cpu": "#F4A259", "disk": "#4F8A94"}
TIER_NAMES = {"gpu": "GPU", "cpu": "CPU", "disk": "disk"}

OTHER_BUFFERS = "other buffers"
# The large buffers. Nobody reads a legend of fifteen, so the rest share one colour.
# A staging buffer has a light shade of the colour of its content.
BUFFER_COLORS = {
    "weights": "#3558E6",
    "cache": "#178A2E",
    "weight staging": "#97BEF8",
    "cache staging": "#66E39A",
    "workspace": "#FFC61A",
    "hidden states": "#943CA1",
    "runtime": "#616468",
    OTHER_BUFFERS: "#D8DADC",
}
PHASE_COLORS = {"prefill": "#C9A27E", "decode": "#7A4B22", "run": "#B5793F"}
# Of a curve or of bars that show none of these things.
NEUTRAL_COLOR = "#2A7F9E"
# Several curves in one picture: Okabe and Ito's palette.
CURVE_COLORS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#000000",
)

COMPUTATION = "computation"
# What the tasks of a schedule move, by the end of their kind. Computation has the colour of its
# workspace, and what is moved that of its buffer.
_MOVED = {
    "_weights": "weights",
    "_experts": "weights",
    "_cache": "cache",
    "_hidden": "hidden states",
    "_queries": "hidden states",
    "_attended": "hidden states",
    "_tokens": "hidden states",
    "_made": "hidden states",
}
TASK_COLORS = {
    "weights": BUFFER_COLORS["weights"],
    "cache": BUFFER_COLORS["cache"],
    "hidden states": BUFFER_COLORS["hidden states"],
    COMPUTATION: BUFFER_COLORS["workspace"],
}


def content_of_task(kind: str) -> str:
    """Return the key of ``TASK_COLORS`` for a kind of task: the content that it moves."""
    if kind == "run_experts":
        return COMPUTATION
    return next((what for end, what in _MOVED.items() if kind.endswith(end)), COMPUTATION)
