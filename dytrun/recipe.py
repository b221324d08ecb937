"""How each run of a pair was made: its command, its configuration, and what differed from the others."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dytrun.figures import Group
from dytrun.markup import table
from dytrun.records import difference
from dytrun.runs import Run

# More runs than these are folded together.
_MOST_RUNS = 12


def differences(groups: Sequence[Group], title: str) -> str:
    """Return a table of what differs between the arms: of the science, then of where they ran."""
    if len(groups) < 2:
        return ""
    firsts = [group.runs[0] for group in groups]
    found = {key: None for run in firsts[1:] for key, _, _ in difference(firsts[0].result.science, run.result.science)}
    values = {key: [value_at(run.result.science, key) for run in firsts] for key in sorted(found, key=_place)}
    # An empty list where another norm has no such setting is no difference.
    rows = [[key, *map(told, row)] for key, row in values.items() if any(value not in (None, [], {}) for value in row)]
    seeds = [_all(group, lambda run: run.result.seed) for group in groups]
    rows += [["seed", *seeds]] * (len(set(seeds)) > 1)
    facts = [_where(run) for group in groups for run in group.runs]
    for name in dict.fromkeys(name for fact in facts for name in fact):
        if len({told(fact.get(name)) for fact in facts}) > 1:
            rows.append([name, *(_all(group, lambda run, name=name: _where(run).get(name)) for group in groups)])
    drawn = table(["key", *(group.arm.label for group in groups)], rows, "What differed; all else was the same")
    return f'<div class=scroll tabindex=0 role=region aria-label="What differed, {escape(title)}">{drawn}</div>'


def recipes(groups: Sequence[Group]) -> str:
    """Return a folded part for each run; where they are many, they are folded together."""
    parts = [_recipe(group, run) for group in groups for run in group.runs]
    text = "\n".join(parts)
    if len(parts) <= _MOST_RUNS:
        return text
    return f"<details class=run><summary>{len(parts)} runs: commands and configurations</summary>{text}</details>"


def _recipe(group: Group, run: Run) -> str:
    """Return the folded part on one run: command, facts, the whole configuration."""
    result = run.result
    top1 = f", {result.top1:.2f} %" if result.top1 is not None else ""
    place = f"command-{escape(run.name)}"
    command = "<p class=quiet>Its command was not recorded.</p>"
    if run.command:
        command = (
            f'<p><button type=button data-copies="{place}">Copy</button></p>'
            f'<pre id="{place}" tabindex=0>{escape(run.command)}</pre>'
        )
    facts = {
        "directory": run.name, "started": run.started, "outcome": result.message or result.status,
        "steps": result.steps, "parameters": result.num_params, "norm": result.norm_impl,
        "images": result.data_pack or result.data_fingerprint,
    } | _where(run)  # fmt: skip
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(told(value))}</dd>" for name, value in facts.items()
                   if value not in (None, ""))  # fmt: skip
    config = escape(json.dumps(run.config, indent=1, ensure_ascii=False))
    return (
        f"<details class=run><summary>{escape(group.arm.label)}, seed {result.seed}: {result.status}{top1}</summary>"
        f'{command}<dl>{listed}</dl><details class="inner config"><summary>Configuration (config.json)</summary>'
        f"<pre tabindex=0>{config}</pre></details></details>"
    )


def _where(run: Run) -> dict[str, Any]:
    """Return what a run was computed with and on."""
    result = run.result
    commit = f"{result.commit}{', with changes' if result.dirty else ''}" if result.commit else None
    facts = {"device": result.device, "ranks": result.ranks, "commit": commit}
    facts |= {f"machine.{key}": value for key, value in result.machine.items()}
    return facts | dict(result.versions)


def _all(group: Group, value: Any) -> str:
    return ", ".join(dict.fromkeys(told(value(run)) for run in group.runs))


def _place(key: str) -> tuple[bool, str]:
    return not key.endswith(".name"), key


def value_at(science: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key, or None."""
    found: Any = science
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def told(value: Any) -> str:
    """Return a value as a reader knows it from a command line."""
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)
