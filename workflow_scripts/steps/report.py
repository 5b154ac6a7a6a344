"""The comparison: one page and one table from the scores of all experiments and seeds (docs/report.md: how to read them).

In: score files, which are the inputs; answers, manifests, curves, run.json beside them, read where they lie. Out:
comparison.html, which needs neither a network nor other files, and comparison.csv, a row for each comparison of the families.

    python -m workflow_scripts.steps.report --step results/report/manifest.json --out trial/report/manifest.json \\
        --inputs results/*_*.json results/*/rm_eval.json
"""

from workflow_scripts.artifacts import manifests
from workflow_scripts.plumbing import startup
from workflow_scripts.steps import cli


def main(job: manifests.Job) -> None:
    from workflow_scripts.report import collect, judge, page

    startup.ready()
    world = collect.read(job)
    families, controls = judge.families(world), judge.controls(world)
    html = page.render(world, families, controls)
    table = page.table(families)
    for control in controls:
        print(f"{control.name} control: {control.state}: {control.what}", flush=True)
    for family in families:
        for comparison in family.result.comparisons:
            print(f"{family.name}: {comparison.after} against {comparison.before}: {comparison.words}", flush=True)
    for warning in world.warnings:
        print(f"warning: {warning}", flush=True)
    with manifests.complete(job, "report", {}) as draft:
        (draft.folder / "comparison.html").write_text(html, encoding="utf-8")
        (draft.folder / "comparison.csv").write_text(table, encoding="utf-8")
        draft.manifest |= {"warnings": world.warnings, "controls": {control.name: control.passed for control in controls}}


if __name__ == "__main__":
    cli.run(main, __doc__)
