"""The figures that are computed: 2, 3 and the window in which their claims hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..common.drawing import save_figure
from ..common.output import table_lines, write_csv, write_json
from . import toys
from .pictures import picture_figure2, picture_figure3, picture_window
from .sharp_well import SharpWell
from .swarm import METHODS
from .toys import VERDICTS, escape_window, gradient_noise, many_starts

__all__ = ["FIGURES"]


def make_figure2(out: Path) -> list[Path]:
    """Start everywhere in the sharp well, without noise."""
    toy = many_starts()
    medians = {m: toy.losses(m).median(0).values.tolist() for m in METHODS}
    summary = [
        {**toy.summary(m), **{f"median_loss_{t}": medians[m][t] for t in (5, 10, 20, 40)}}
        for m in METHODS
    ]
    print("\n".join(table_lines(summary)))
    curves = [
        {"method": m, "step": t, "median_loss": value}
        for m in METHODS
        for t, value in enumerate(medians[m])
    ]
    return [
        *save_figure(picture_figure2(toy), out / "figure2.png", caption_figure2(toy.about)),
        write_csv(out / "figure2.csv", curves),
        write_json(out / "figure2.json", {"constants": toy.about, "summary": summary}),
    ]


def make_figure3(out: Path) -> list[Path]:
    """Start at the bottom, with noise in the gradient."""
    toy = gradient_noise()
    summary = [toy.summary(m) for m in METHODS]
    print("\n".join(table_lines(summary)))
    ends = [
        {"method": m, "schedule": i, "steps": when if when >= 0 else None, "path": length}
        for m in METHODS
        for i, (when, length) in enumerate(
            zip(toy.arrivals(m).tolist(), toy.lengths(m).tolist(), strict=True)
        )
    ]
    return [
        *save_figure(picture_figure3(toy), out / "figure3.png", caption_figure3(toy.about)),
        write_csv(out / "figure3.csv", ends),
        write_json(out / "figure3.json", {"constants": toy.about, "summary": summary}),
    ]


def make_escape_map(out: Path) -> list[Path]:
    """Try Figure 2's claims over learning rates and radii."""
    window = escape_window(toys.ETAS, toys.RHOS)
    verdicts = window.verdicts()
    rows = [
        {"eta": eta, "rho": rho}
        | {f"{m} percent": 100 * float(v[i, j]) for m, v in window.arrived.items()}
        | {"verdict": verdicts[i][j]}
        for i, eta in enumerate(toys.ETAS)
        for j, rho in enumerate(toys.RHOS)
    ]
    for said in VERDICTS:
        print(f"{said}: {sum(row['verdict'] == said for row in rows)} of {len(rows)} settings")
    holds = [(row["eta"], row["rho"]) for row in rows if row["verdict"] == VERDICTS[0]]
    print(f"every claim holds at (eta, rho) = {', '.join(map(str, holds))}")
    caption = landscape_formula(vars(SharpWell())) + (
        "U is the inverse of its Hessian averaged over the disc r < 8. Starts at 7 radii in the "
        "sharp well (on both axes of U for the methods with U), 400 steps. Every claim holds: GD "
        "and LLQR never reach r < 1, SAM and LLQR+SAM do from every start."
    )
    return [
        *save_figure(picture_window(window), out / "figure-escape-map.png", caption),
        write_csv(out / "figure-escape-map.csv", rows),
        write_json(out / "figure-escape-map.json", rows),
    ]


def landscape_formula(well: dict) -> str:
    """Say the landscape."""
    k, h, R, w = (well[name] for name in "khRw")
    return f"L = {k / 2:g} r² - {h:g} exp(-(r - {R:g})² / (2·{w:g}²)). "


def caption_of(about: dict) -> str:
    """Say the constants that both toys share."""
    (a, b), (_, c) = about["U"]
    mean = (a + c) / 2
    return landscape_formula(about["well"]) + (
        f"One learning rate and radius for all: η = {about['eta']:g}, ρ = {about['rho']:g}. U is "
        f"the inverse of the Hessian averaged over the disc r < 8, [[{a:.3f}, {b:.3f}], [{b:.3f}, "
        f"{c:.3f}]]. It is nearly {mean:.2f} times the identity, so LLQR+SAM here is close to SAM "
        f"with η x {mean:.2f} and ρ x {mean**0.5:.2f}. "
    )


def caption_figure2(about: dict) -> str:
    """Say what was run for Figure 2."""
    return (
        f"Bold: median over {about['starts']} starts in the sharp well (24 angles x 7 radii), "
        "thin: the 7 radii of one angle; no noise. Arrived (grey): r < 1; mean ± standard "
        "deviation of the steps. GD and LLQR lie on each other. "
    ) + caption_of(about)


def caption_figure3(about: dict) -> str:
    """Say what was run for Figure 3."""
    return caption_of(about) + (
        f"Noise of variance {about['variance']:g} is added to the gradient before U; "
        f"{about['schedules']} schedules. Start at the bottom, on the ray of {about['angle']:g}°."
    )


# number in the paper, or a name -> function(folder) that makes it and returns the files it wrote
FIGURES: dict[str, Callable[[Path], list[Path]]] = {
    "2": make_figure2,
    "3": make_figure3,
    "escape-map": make_escape_map,
}
