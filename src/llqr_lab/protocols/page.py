"""The page of the protocols, made by ``python -m llqr_lab.protocols.page docs/protocols.md``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .experiments import EXPERIMENTS, OWN, Experiment
from .scales import SMALL_CADENCE, SMALL_IMAGES, SMALL_TEXT, SMOKE
from .settings import METHODS, Group, Setting

__all__ = ["protocols_page"]

HEAD = """\
# Protocols

<!-- Made by `python -m llqr_lab.protocols.page docs/protocols.md`; do not edit. -->

Every hyperparameter of the paper's tables 1 to 8 and 10 and figures 1, 4, 5 and 6. Table 9 has
none: it counts the parameters of modules. Each value says where it comes from:

- **paper**: the paper's text, tables or captions;
- **authors' recipe**: the commands and code conventions of the paper's authors, or a published
  recipe that the paper cites; the note says which. "Li et al. (2024)": the commands and code of
  Friendly SAM, with the learning rate, batch, epochs and schedule of the paper's CIFAR protocol.
  "fairseq": its IWSLT14 recipe, which the paper follows;
- **assumed**: neither says; chosen here. A result that differs from the paper's may be due to it;
- **scale**: of runs that are smaller than the paper's (`scale=small`, `scale=smoke`), and of the
  experiments of this project at the end of the page;
- **tuned here**: found by `python -m llqr_lab.recipes.search`, the demo's by
  `python -m llqr_lab.search_demo`.

The values live in `llqr_lab.protocols`. `resolve_settings(experiment, dataset, model, method,
scale)` returns those of one run, and `llqr run` takes them from there. What follows `base.`,
`llqr.`, `probe.` and `optimizer.` are arguments of the base optimizer, `llqr.LLQR`, the
perturbation and `llqr.Optimizer`; `model.` those of the network. Within a table, and from the
shared tables to those of an experiment, a later value of a key replaces an earlier one.

The order of the training data and their augmentation, the label noise, the initialisation and the
refresh minibatches each have their own generator, so that all methods of a row see identical
batches.
"""

ON_STEP: Mapping[bool | str, str] = {
    True: "yes",
    False: "no",
    "bases": "the base steps in its bases",
}


def protocols_page() -> str:
    """Return the whole page."""
    groups: dict[str, Group] = {}
    for experiment in EXPERIMENTS.values():
        groups.update({group.title: group for group in experiment.groups})
    smaller = (SMALL_IMAGES, SMALL_TEXT, SMALL_CADENCE, SMOKE)
    groups.update({group.title: group for group in smaller})
    parts = [HEAD, "## Methods\n", _methods_table(), "## Shared settings\n"]
    for title, group in groups.items():
        parts += [f"### {title}\n", _settings_table(group)]
    parts.append("## Tables and figures\n")
    for name, experiment in EXPERIMENTS.items():
        if name == OWN[0]:
            parts.append("## Experiments of this project\n")
        parts += [f"### {_heading_prefix(name)}{experiment.title}\n", _runs_list(experiment)]
        if experiment.own:
            parts.append(_settings_table(experiment.own))
    return "\n".join(parts)


def _heading_prefix(key: str) -> str:
    name = key.partition("-")[0]  # of table5-literal
    word = name.rstrip("0123456789")
    return "" if key in (*OWN, "demo") else f"{word.capitalize()} {name.removeprefix(word)}: "


def _methods_table() -> str:
    rows = [
        (
            name,
            m.base or "",
            m.metric or "",
            m.curvature or "",
            ", ".join([m.probe or "", *(f"{k}={v}" for k, v in m.probe_options.items())]),
            ON_STEP[m.transport] * bool(m.metric),
        )
        for name, m in METHODS.items()
    ]
    header = ("Method", "Base", "U", "Curvature", "Perturbation", "U acts on the step")
    return _markdown_table(header, rows)


def _runs_list(experiment: Experiment) -> str:
    lines = {
        "Data": experiment.datasets,
        "Networks": experiment.models,
        "Methods": experiment.methods,
        "Shared settings": [group.title for group in experiment.groups],
    }
    return "".join(f"- {what}: {', '.join(which)}\n" for what, which in lines.items())


def _settings_table(settings: Iterable[Setting]) -> str:
    rows = []
    for s in settings:
        rows.append(
            (f"`{s.key}`", _value_text(s.value), s.source.value, s.condition_text(), s.note)
        )
    return _markdown_table(("Setting", "Value", "Source", "For", "Note"), rows)


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(map(_value_text, value))
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None else str(value)


def _markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(protocols_page(), encoding="utf-8")
