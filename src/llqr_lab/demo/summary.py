"""What the demo's runs say: means, paired differences, the way to a loss, what U did."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..common.output import difference_text, plus_minus, without_nan
from ..common.refreshes import INACTIVE, summarise_refreshes
from ..common.statistics import mean_std, paired_difference
from ..protocols import DEMO_METHODS, METHODS
from ..study.readings import step_of_target, verdict
from .runs import History

__all__ = ["conclusion_lines", "refresh_lines", "result_rows", "summarise_runs"]

Summary = dict[str, Any]
TARGET, BASELINE = "SGDM", "SAM"  # whose final loss is to be reached, and whose accuracy


def summarise_runs(
    settings: Mapping[str, Mapping[str, Any]], histories: Mapping[str, Sequence[History]]
) -> dict[str, Summary]:
    """Return plain data (for JSON) of each method: one history per seed, in the same order."""
    final = {name: [h.test_accuracy[-1] for h in hs] for name, hs in histories.items()}
    return {
        name: {
            "settings": dict(settings[name]),
            "test_accuracy": final[name],
            "mean": statistics.fmean(final[name]),
            "std": mean_std(final[name])[1],
            "minus_SAM": paired_difference(final[name], final[BASELINE]),
            "final_loss": statistics.fmean(h.loss[-1] for h in hs),
            "seconds": statistics.median(h.seconds[-1] for h in hs),
            "to_SGDMs_loss": _way_to_loss(hs, histories[TARGET]),
            "beside_base": _beside_base(name, histories),
            "train_accuracy": [h.train_accuracy for h in hs],
            "test_accuracy_by_epoch": [h.test_accuracy for h in hs],
            "loss_by_epoch": [h.loss for h in hs],
            "seconds_by_epoch": [h.seconds for h in hs],
            "steps_by_epoch": histories[TARGET][0].steps,
            "skipped_steps": [h.skipped_steps for h in hs],
            "refreshes": summarise_refreshes([r for h in hs for r in h.reports]),
            "reports": [[without_nan(asdict(r)) for r in h.reports] for h in hs],
        }
        for name, hs in histories.items()
    }


def _beside_base(name: str, histories: Mapping[str, Sequence[History]]) -> dict[str, Any] | None:
    """Return how a method with U is beside its base by itself; None: its base is no AdamW.

    Of the others the base is SGDM, which all methods are compared with.
    """
    base = METHODS[DEMO_METHODS[name]].base
    if base is None or base == name or base not in histories:
        return None
    own, others = histories[name], histories[base]
    return {
        "base": base,
        "to_its_loss": _way_to_loss(own, others),
        "its_steps": others[0].steps[-1],
        "its_seconds": statistics.median(h.seconds[-1] for h in others),
        "minus_base": paired_difference(
            *([h.test_accuracy[-1] for h in hs] for hs in (own, others))
        ),
    }


def _way_to_loss(
    histories: Sequence[History], targets: Sequence[History]
) -> dict[str, float] | None:
    """Return steps and seconds to the loss at which another ends with the same seed: medians.

    Losses are means of epochs, with straight lines between their ends. None: fewer than half of the
    seeds get there.
    """
    found: dict[str, float] = {}
    for what in ("steps", "seconds"):
        ways = []
        for own, target in zip(histories, targets, strict=True):
            curve = [list(point) for point in zip(getattr(own, what), own.loss, strict=True)]
            ways.append(step_of_target(curve, 1, target.loss[-1], sign=-1))
        found[what] = statistics.median(ways)
    return None if math.inf in found.values() else found


def result_rows(methods: Mapping[str, Summary]) -> list[dict[str, Any]]:
    """Return the table of results, one row per method."""
    return [
        {
            "method": name,
            "training loss": f"{m['final_loss']:.3f}",
            "test %": plus_minus(m["mean"], m["std"], mark="+-"),
            "minus SAM": "-" if name == BASELINE else difference_text(m["minus_SAM"], mark="+-"),
            "seconds": f"{m['seconds']:.2f}",
            "steps to SGDM's loss": _steps_text(m["to_SGDMs_loss"]),
        }
        for name, m in methods.items()
    ]


def _steps_text(way: Mapping[str, float] | None) -> str:
    return "not reached" if way is None else f"{way['steps']:.0f}"


def conclusion_lines(methods: Mapping[str, Summary]) -> list[str]:
    """Return what the numbers say, in plain words: on speed, on the test, and on U."""
    return [
        _speed_text(methods),
        _test_text(methods),
        *_base_texts(methods),
        *_inactive_text(methods),
    ]


def _speed_text(methods: Mapping[str, Summary]) -> str:
    target = methods[TARGET]
    whole = {"steps": target["steps_by_epoch"][-1], "seconds": target["seconds"]}
    shares = {
        name: {what: m["to_SGDMs_loss"][what] / whole[what] for what in whole}
        for name, m in methods.items()
        if name != TARGET and m["to_SGDMs_loss"] is not None
    }
    first = min(shares, key=lambda name: shares[name]["steps"], default=None)
    if first is None or shares[first]["steps"] >= 1:
        return f"No method is earlier than {TARGET} at the training loss at which {TARGET} ends."
    return (
        f"{first} is the first at the training loss at which {TARGET} ends: in "
        f"{shares[first]['steps']:.0%} of its steps and {shares[first]['seconds']:.0%} of its "
        "seconds."
    )


def _test_text(methods: Mapping[str, Summary]) -> str:
    said: dict[str, list[str]] = {"better": [], "worse": [], "level": [], "": []}
    for name, m in methods.items():
        if name != BASELINE:
            said[verdict(m["minus_SAM"])].append(name)
    if said[""]:
        return f"On the test no difference to {BASELINE} can be told from so few seeds."
    parts = [
        f"{_listed(said[word])} {'is' if len(said[word]) == 1 else 'are'} {word} than {BASELINE}"
        for word in ("better", "worse")
        if said[word]
    ]
    if said["level"]:
        parts.append(f"between {_listed(said['level'])} and {BASELINE} no difference can be told")
    return f"On the test, by two standard errors, {'; '.join(parts)}."


def _base_texts(methods: Mapping[str, Summary]) -> list[str]:
    texts = []
    for name, m in methods.items():
        if (beside := m["beside_base"]) is None:
            continue
        base, way = beside["base"], beside["to_its_loss"]
        reached = f"does not reach the training loss at which {base} ends"
        if way is not None:
            steps, seconds = (way[what] / beside[f"its_{what}"] for what in ("steps", "seconds"))
            reached = (
                f"is at the training loss at which {base} ends in {steps:.0%} of its steps and "
                f"{seconds:.0%} of its seconds"
            )
        difference = beside["minus_base"]
        told = verdict(difference)
        tested = f"it is {told}" if told in ("better", "worse") else "no difference can be told"
        texts.append(
            f"{name}, whose base is {base}, {reached}; on the test {tested} "
            f"({difference_text(difference, mark='+-')})."
        )
    return texts


def _inactive_text(methods: Mapping[str, Summary]) -> list[str]:
    names = [n for n, m in methods.items() if m["refreshes"] and not m["refreshes"]["active"]]
    if not names:
        return []
    return [f"U is inactive in {_listed(names)}: what is seen there is the base and the probe."]


def _listed(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def refresh_lines(methods: Mapping[str, Summary]) -> list[str]:
    """Return two lines per method with U: what its refreshes did, and whether U acts."""
    lines = []
    for name, method in methods.items():
        r = method["refreshes"]
        if r is None:
            continue
        kind = ", ".join(
            f"{word} {method['settings'][key]}".strip()
            for key, word in (("structure", ""), ("inner_lr", "inner lr"))
            if key in method["settings"]
        )
        lowered = (
            ""
            if r["J_after"] is None
            else f", J {_shown_number(r['J_before'])} -> {_shown_number(r['J_after'])}"
        )
        lines.append(
            f"{name} ({kind or 'closed form'}): {r['accepted']} of {r['count']} refreshes accepted"
            f"{lowered}"
        )
        verdict_text = "" if r["active"] else f"; U inactive (below {INACTIVE:g}: U hardly acts)"
        lines.append(
            f"    |Ug-g|/|g| {_shown_number(r['change'])}, |Ug|/|g| {_shown_number(r['ratio'])}, "
            f"cos {_shown_number(r['cosine'])}, eigenvalues of U "
            f"{_shown_number(r['smallest_eigenvalue'])} .. "
            f"{_shown_number(r['largest_eigenvalue'])}{verdict_text}"
        )
    return lines


def _shown_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
