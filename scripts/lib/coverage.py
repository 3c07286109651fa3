"""Adds up llvm-cov's exports: lines and branches covered, per file and folder, without the test modules.

Usage: coverage.py LINES.lcov BRANCHES.json [--json] [--missed]. Called by scripts/coverage.
A branch is one outcome of one condition. The unit tests, the simulation's tests and the simulator are three builds of the
same source; a line or branch counts as covered where one of them reached it.
"""

import json
import os
import sys
from collections import defaultdict

FOLDERS = ("src/mirror", "src/format")


def relative(path):
    return os.path.relpath(path)


def counts(path):
    """Whether a source file counts: it is in one of the folders and no test module."""
    return path.startswith(tuple(f"{folder}/" for folder in FOLDERS)) and "/tests" not in path


def first_test_line(path):
    """The line on which the file's test module begins; behind the last line where it has none."""
    with open(path) as file:
        lines = file.readlines()
    for number, line in enumerate(lines[:-1], 1):
        if line.startswith("#[cfg(test)]") and lines[number].startswith("mod tests {"):
            return number
    return len(lines) + 1


def lines_by_file(lcov):
    """File -> line -> times reached, at most over the builds."""
    files = defaultdict(lambda: defaultdict(int))
    current = None
    with open(lcov) as file:
        for line in file:
            kind, _, rest = line.strip().partition(":")
            if kind == "SF":
                current = relative(rest)
            elif kind == "DA":
                number, times = (int(field) for field in rest.split(",")[:2])
                files[current][number] = max(files[current][number], times)
    return files


def branches_by_file(export):
    """File -> place -> [times true, times false]."""
    files = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    with open(export) as file:
        data = json.load(file)["data"]
    for entry in (entry for part in data for entry in part["files"]):
        for branch in entry["branches"]:
            place = tuple(branch[:4])
            taken = files[relative(entry["filename"])][place]
            taken[0] += branch[4]
            taken[1] += branch[5]
    return files


def figures(lcov, export):
    """One row a file: name, lines, lines covered, branches, branches covered, missed lines."""
    lines, branches = lines_by_file(lcov), branches_by_file(export)
    rows = []
    for name in sorted(filter(counts, lines)):
        end = first_test_line(name)
        reached = {number: times for number, times in lines[name].items() if number < end}
        outcomes = [times for place, both in branches[name].items() if place[0] < end for times in both]
        missed = sorted(number for number, times in reached.items() if times == 0)
        rows.append({
            "name": name,
            "lines": len(reached),
            "lines_covered": len(reached) - len(missed),
            "branches": len(outcomes),
            "branches_covered": sum(times > 0 for times in outcomes),
            "missed": missed,
        })
    return rows


def total(name, rows):
    keys = ("lines", "lines_covered", "branches", "branches_covered")
    return {"name": name} | {key: sum(row[key] for row in rows) for key in keys}


def percent(part, whole):
    return f"{100 * part / whole:6.1f} %" if whole else "      -"


def show(row, missed):
    print(f"{row['name']:<28} {row['lines_covered']:>5}/{row['lines']:<5} "
          f"{percent(row['lines_covered'], row['lines'])}   "
          f"{row['branches_covered']:>5}/{row['branches']:<5} {percent(row['branches_covered'], row['branches'])}")
    if missed and row.get("missed"):
        print("    missed: " + " ".join(str(number) for number in row["missed"]))


def main():
    lcov, export, *options = sys.argv[1:]
    rows = figures(lcov, export)
    totals = [total(folder, [row for row in rows if row["name"].startswith(folder)]) for folder in FOLDERS]
    if "--json" in options:
        print(json.dumps({"files": rows, "totals": totals}, indent=1))
        return
    print(f"{'':<28} {'lines':>21}   {'branches':>20}")
    for row in rows:
        show(row, "--missed" in options)
    print()
    for row in totals:
        show(row, False)


main()
