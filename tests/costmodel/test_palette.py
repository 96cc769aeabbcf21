"""Colours can be told apart by everybody, and mean one thing in all pictures."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from costmodel.cli import palette
from costmodel.cli.plots import draw_placement
from costmodel.plan.plan import Plan
from costmodel.plan.policy import Placement
from costmodel.schedule.zigzag import ZigzagSchedule
from tests.costmodel.machines import ON_GPU, make_mixture, make_model, make_policy

Array = npt.NDArray[np.float64]

# Machado, Oliveira and Fernandes (2009): what linear RGB looks like without one kind of cones.
VISIONS: dict[str, Array] = {
    "normal": np.eye(3),
    "no red": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "no green": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "no blue": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
SPREAD = Placement(gpu=0.3, cpu=0.3, disk=0.4)
WHITE = np.array([0.95047, 1.0, 1.08883])


def _lab(color: str, vision: Array) -> Array:
    """Return CIE L*a*b* of a colour as somebody sees it."""
    srgb = np.array(to_rgb(color))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(vision @ linear, 0, 1) / WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def _least_distance(colors: list[str]) -> float:
    return min(
        float(np.linalg.norm(_lab(one, vision) - _lab(other, vision)))
        for vision in VISIONS.values()
        for one, other in itertools.combinations(colors, 2)
    )


@pytest.mark.parametrize(
    "colors", [palette.TIER_COLORS, palette.BUFFER_COLORS, palette.PHASE_COLORS]
)
def test_everybody_can_tell_the_colors_of_a_picture_apart(colors: dict[str, str]) -> None:
    assert _least_distance([*colors.values()]) >= _least_distance([*palette.CURVE_COLORS])


def test_a_color_means_one_thing() -> None:
    groups = (palette.TIER_COLORS, palette.BUFFER_COLORS, palette.PHASE_COLORS)
    colors = [color for group in groups for color in group.values()]
    assert len(set(colors)) == len(colors)


def test_moves_have_the_color_of_what_they_move() -> None:
    seen: dict[str, str] = {}
    plain = make_policy(model=make_model(), weights=SPREAD, cache=SPREAD, activations=SPREAD)
    mixture = make_policy(model=make_mixture(), weights=SPREAD, cache=SPREAD, activations=ON_GPU)
    mixture = replace(mixture, loads_on_demand=True, cpu_experts=0.5)
    for policy in (plain, mixture):
        plan = Plan.of(replace(policy, cpu_attention=0.5), has_gpu=True)
        seen |= {t.kind: t.channel for t in ZigzagSchedule(plan, num_batches=2, num_tokens=3)}
    assert {"read_experts", "send_experts", "return_tokens", "run_experts", "attend"} <= set(seen)
    for kind, channel in seen.items():
        content = palette.content_of_task(kind)
        assert (content == palette.COMPUTATION) == channel.endswith("_compute"), kind
        for name in ("weights", "cache", "hidden"):
            assert content.startswith(name) or not kind.endswith(name)


def test_a_plot_takes_its_colors_from_the_palette() -> None:
    axes = Figure().subplots()
    policy = make_policy()
    draw_placement(axes, policy)
    # The first bar of each tier.
    bars = [container[0] for container in axes.containers]
    drawn = [to_hex(bar.get_facecolor()).upper() for bar in bars]
    assert drawn == [*palette.TIER_COLORS.values()]
