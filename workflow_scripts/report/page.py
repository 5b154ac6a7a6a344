"""The page itself, and the table for other programs.

The page carries all that it shows and asks nothing of a network: a content security policy allows its own style, and its own
script by hash, and nothing else. Stored text reaches it escaped by the template, or as JSON whose angle brackets are escaped; the
script puts it in place as text.
"""

import base64
import hashlib
from pathlib import Path

import pandas
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from workflow_scripts.config.names import answered
from workflow_scripts.report import capacity, drawn, figures, protocols, sections, sensitivity, winning
from workflow_scripts.report.collect import World
from workflow_scripts.report.judge import Control, Judged, hollow, mixed, turned, unevenly_tuned
from workflow_scripts.report.trained import PLACEBO

TEMPLATES = Path(__file__).parents[1] / "report/templates"  # so named that a change of them makes the report stale


def render(world: World, families: list[Judged], controls: list[Control]) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"points": points, "p": p_text}
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    budgets = sections.budgets(world)
    return environment.get_template("report.html.jinja").render(
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=f"sha256-{digest}",
        world=world,
        one_seed=len(world.seeds) == 1,
        level=level(world.config["report"]["alpha"]),
        families=[
            shown(world, family)
            | {
                "grouped": bool(world.groups(family.task)),
                "mixed": mixed(world, declared),
                "uneven": unevenly_tuned(world, declared),
            }
            for family, declared in zip(families, world.config["report"]["families"], strict=True)
        ],
        turned=turned(families),
        controls=controls,
        hollow=[
            f"{one.after} against {one.before}: {one.words} ({family.name})"
            for family in families
            for one in family.result.comparisons
            if hollow(world, one)
        ],
        failed=[control for control in controls if control.passed is False],
        training=sections.training(world),
        scores=sections.scores(world),
        drawn=drawn.drawn(world),
        protocols=protocols.protocols(world),
        capacity=capacity.capacity(world),
        sensitivity=sensitivity.sensitivity(world),
        wins=winning.wins(world),
        kinds=sections.kinds(world),
        lengths=sections.lengths(world),
        curves=sections.curves(world),
        rewards=sections.rewards(world),
        budgets=budgets,
        self_made=any(row["drawn"] for row in budgets),
        costs=sections.costs(world),
        tree=sections.tree(world),
        viewer=sections.viewer(world),
        label={task: world.label(task) for task in world.config["tasks"]},
        placebo=PLACEBO,
        choice=[world.label(task).split(",")[0] for task in world.config["tasks"] if task not in answered(world.config["tasks"])],
    )


def shown(world: World, family: Judged) -> dict:
    """What the template says of a family: its rows in points, and its forest plot."""
    rows = []
    for one in family.result.comparisons:
        rows.append(
            {
                "label": f"{one.after} - {one.before}",
                "after": one.after,
                "before": one.before,
                "verdict": one.verdict,
                "words": one.words + (" (a placebo)" if hollow(world, one) else ""),
                "shade": "worse" if hollow(world, one) else one.verdict,
                "p": one.p_family,
                "unpooled": f"{points(one.low_unpooled)} to {points(one.high_unpooled)}",
                "mcnemar": [f"{m.only_after} : {m.only_before}, p {p_text(m.p)}" for m in one.mcnemar],
                **{key: 100 * getattr(one, key) for key in ("mean_after", "mean_before", "difference", "low", "high")},
                **{key: 100 * getattr(one, key) for key in ("low_simultaneous", "high_simultaneous", "se")},
                "df": one.seed_df,
            }
        )
    return {
        "name": family.name,
        "title": family.title,
        "task": family.task,
        "role": role(family),
        "result": family.result,
        "rows": rows,
        "forest": figures.forest(
            [row | {"verdict": row["shade"]} for row in rows],
            level(family.result.alpha),
            f"{family.title}: differences with intervals",
        ),
    }


def role(family: Judged) -> str:
    return "confirmatory" if family.confirmatory else "exploratory"


def level(alpha: float) -> str:
    """Of the intervals, in percent."""
    return f"{100 * (1 - alpha):g}"


def points(value: float) -> str:
    """A share as percentage points with a sign."""
    return f"{100 * value:+.1f}"


def p_text(p: float | None) -> str:
    """A p for people; one seed has none."""
    if p is None:
        return "none"
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def table(families: list[Judged]) -> str:
    """comparison.csv: a row for each comparison; shares, not percent."""
    parts = []
    for family in families:
        result, part = family.result, family.result.table()
        facts = {
            "family": family.name,
            "role": role(family),
            "task": family.task,
            "seeds": result.seeds,
            "prompts": result.prompts,
        }
        facts |= {"mde": result.mde, "margin": result.margin}
        for at, (name, value) in enumerate(facts.items()):
            part.insert(at, name, value)
        parts.append(part)
    return pandas.concat(parts).map(cell).to_csv(index=False, float_format="%.8g", lineterminator="\n")


def cell(value: object) -> object:
    """A value for a spreadsheet: a text that one would take for a formula gets an apostrophe; numbers stay numbers."""
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
