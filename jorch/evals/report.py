"""The last station of a run: its folder's files as one self-contained report.html.

Reads summary.json, and where they exist metrics.jsonl, trajectories.jsonl and config.yaml. Everything shown
comes from these files; the page loads nothing and runs no script.
"""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jorch.evals import sections
from jorch.evals.tables import columns, headline
from jorch.run_folder import CONFIG, METRICS, atomic_write, read_jsonl


def write_report(run_folder: Path) -> Path:
    """Write `run_folder`/report.html and return its path.

    Raises ValueError where summary.json is missing or is not JSON, OSError where the page cannot be written.
    """
    summary = read_summary(run_folder / "summary.json")
    metrics = read_jsonl(run_folder / METRICS)
    shares = sections.expert_shares(summary)
    config = run_folder / CONFIG
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        run_name=run_folder.resolve().name,
        headline=headline(summary),
        tiles=sections.tiles(summary),
        facts=sections.facts(summary, metrics),
        columns=columns(summary),
        table=sections.table(summary),
        policy_figures=sections.policy_figures(summary),
        curves=sections.curves(metrics),
        expert_policies=list(shares),
        expert_figures=sections.expert_figures(shares),
        stages=sections.bars(summary.get("wall_s") or {}),
        step_parts=sections.bars(sections.step_parts(metrics)),
        examples=sections.examples(read_jsonl(run_folder / "trajectories.jsonl")),
        versions=sections.flat(summary.get("versions") or {}),
        settings=sections.flat(summary.get("settings") or {}),
        config=config.read_text(encoding="utf-8") if config.exists() else None,
        duration=sections.duration,
        dollars=sections.dollars,
    )
    path = run_folder / "report.html"
    atomic_write(path, page)
    return path


def read_summary(path: Path) -> dict[str, Any]:
    """The content of a summary.json. Raises ValueError where it is missing or is not JSON."""
    if not path.exists():
        raise ValueError(f"{path}: not found; a report needs a finished evaluation (jorch quickstart, jorch eval)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not JSON ({error.msg}); remove it and run the evaluation again"
        ) from None
