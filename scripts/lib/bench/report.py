"""A run as Markdown, for people and for docs/performance.md, and as JSON, for programs."""

import json

from . import figures, plot, targets
from .contenders import KNOWN

MIRROR = "nbdmirror"
SECTIONS = {"unix": "Unix socket", "tcp": "TCP on loopback", "resync": "Clients and a resync, each against idle",
            "bitmap": "The write-intent bitmap on against off"}


def title(backing, section, where):
    return f"{SECTIONS[section]}, {where[backing, section]}"


def label(name):
    return KNOWN[name][0] if name in KNOWN else name


def summary(cells, part):
    """One table: contenders x jobs, median rate, CPU, and how many times as fast nbdmirror is."""
    jobs, names = cells.jobs(*part), cells.contenders(*part)
    lines = ["| server | " + " | ".join(jobs) + " |", "|---" * (len(jobs) + 1) + "|"]
    for name in names:
        row = []
        for job in jobs:
            cell = cells.get(*part, name, job)
            rate, cpu = figures.of(cell, "ops_per_s"), figures.of(cell, "cpu_us_per_op")
            text = figures.number(rate[0]) if rate else "-"
            text += f"; {figures.number(cpu[0])} us" if cpu else ""
            against = figures.ratio(cells.get(*part, MIRROR, job), cell, "ops_per_s") if name != MIRROR else None
            row.append(text + (f" (x{against[0]:.2f})" if against else ""))
        lines.append(f"| {label(name)} | " + " | ".join(row) + " |")
    return [*lines, "", "Median operations/s; server CPU per operation; in brackets nbdmirror's rate over this one's (above 1: nbdmirror is faster)."]


def details(cells, part):
    """A table for each job: every figure with its spread."""
    lines = []
    for job in cells.jobs(*part):
        lines += ["", f"#### {job}", "", "| server | " + " | ".join(figures.METRICS.values()) + " | nbdmirror's rate over it | its CPU over nbdmirror's |",
                  "|---" * (len(figures.METRICS) + 3) + "|"]
        base = cells.get(*part, MIRROR, job)
        for name in cells.contenders(*part):
            cell = cells.get(*part, name, job)
            if not cell:
                continue
            row = [figures.text(figures.of(cell, metric)) for metric in figures.METRICS]
            for one, two, metric in ((base, cell, "ops_per_s"), (cell, base, "cpu_us_per_op")):
                row.append(figures.text(figures.ratio(one, two, metric)) if name != MIRROR else "1")
            lines.append(f"| {label(name)} | " + " | ".join(row) + " |")
    return lines


def bitmap_lines(cells, backing):
    metrics = {"ops_per_s": "the whole run", "cold_ops_per_s": "first 250 ms", "steady_ops_per_s": "second half", "cpu_us_per_op": "CPU us/op"}
    lines = ["| volume | bitmap | " + " | ".join(metrics.values()) + " |", "|---" * (len(metrics) + 2) + "|"]
    for job in cells.jobs(backing, "bitmap"):
        for name in cells.contenders(backing, "bitmap"):
            cell = cells.get(backing, "bitmap", name, job)
            lines.append(f"| {job} | {name} | " + " | ".join(figures.text(figures.of(cell, metric)) for metric in metrics) + " |")
    return [*lines, "", "4 KiB random writes at depth 32, operations/s."]


def markdown(run):
    lines = ["# scripts/bench " + run["arguments"], "", "| | |", "|---|---|"]
    lines += [f"| {what} | {value} |" for what, value in [*run["header"], *run["watch"].lines()]]
    lines += ["", run["how"], ""]
    lines += [f"- {note}" for note in run["notes"]]
    cells = run["cells"]
    lines += ["", "## Targets", "", *targets.table(cells)]
    for backing, section in cells.parts():
        lines += ["", f"## {title(backing, section, run['where'])}", ""]
        if section == "resync":
            lines += targets.resync_lines(cells, backing)
        elif section == "bitmap":
            lines += bitmap_lines(cells, backing)
        else:
            lines += summary(cells, (backing, section)) + details(cells, (backing, section))
    return "\n".join(lines) + "\n"


def plots(run):
    """File name and SVG of each picture."""
    cells, pictures = run["cells"], {}
    for backing, section in cells.parts():
        heading = title(backing, section, run["where"])
        if section == "bitmap":
            pictures[f"{backing}-bitmap.svg"] = plot.lines(heading, bitmap_series(cells, backing))
        elif section != "resync":
            for metric, name in (("ops_per_s", "rate"), ("cpu_us_per_op", "cpu"), ("p999_us", "p999")):
                panels = panels_of(cells, (backing, section), metric)
                if panels:
                    pictures[f"{backing}-{section}-{name}.svg"] = plot.bars(f"{heading}: {figures.METRICS[metric]}", panels)
    return pictures


def panels_of(cells, part, metric):
    panels = []
    for job in cells.jobs(*part):
        bars = [(name, figures.of(cells.get(*part, name, job), metric)) for name in cells.contenders(*part)]
        bars = [(name, triple) for name, triple in bars if triple]
        if bars:
            panels.append((job, bars))
    return panels


def bitmap_series(cells, backing):
    from .bitmap import LOG_MS
    series = []
    for job in cells.jobs(backing, "bitmap"):
        for name in cells.contenders(backing, "bitmap"):
            samples = figures.values(cells.get(backing, "bitmap", name, job), "series_ops_per_s")
            length = min((len(one) for one in samples), default=0)
            points = [(at * LOG_MS / 1000, figures.spread([one[at] for one in samples])[0]) for at in range(length)]
            series.append((f"{job}, {name}", points))
    return series


def save(run, folder):
    """Writes report.md, results.json and the pictures to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plots(run)
    text = markdown(run)
    links = "\n".join(f"![{name}]({name})" for name in pictures)
    (folder / "report.md").write_text(text + "\n" + links + "\n")
    for name, svg in pictures.items():
        (folder / name).write_text(svg)
    result = {"schema": 1, "arguments": run["arguments"], "header": dict(run["header"]), "noise": run["watch"].moments,
              "noisy": run["watch"].noisy(), "notes": run["notes"], "targets": targets.verdicts(run["cells"]), "cells": run["cells"].as_rows()}
    (folder / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    return text
