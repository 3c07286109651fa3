"""Medians and spreads; ratios between samples of the same round.

A cell is the list of its samples, one for each round, each a dict of figures (see fio.py). Rounds are interleaved, so that
sample n of one cell and sample n of another were taken close together: a ratio is the median of the rounds' ratios.
"""

import statistics

# key: heading, digits
METRICS = {
    "ops_per_s": "operations/s", "mb_per_s": "MB/s", "p50_us": "p50 us", "p99_us": "p99 us", "p999_us": "p99.9 us",
    "cpu_us_per_op": "server CPU us/op",
}


class Cells:
    """All samples of a run, by backing ("tmpfs", "disk"), section ("unix", "tcp", ...), contender and job."""

    def __init__(self):
        self.samples = {}

    def add(self, backing, section, contender, job, sample):
        self.samples.setdefault((backing, section, contender, job), []).append(sample)

    def get(self, backing, section, contender, job):
        return self.samples.get((backing, section, contender, job), [])

    def __bool__(self):
        return bool(self.samples)

    def parts(self):
        """(backing, section) in the order in which they were measured."""
        return list(dict.fromkeys(key[:2] for key in self.samples))

    def jobs(self, backing, section):
        return list(dict.fromkeys(key[3] for key in self.samples if key[:2] == (backing, section)))

    def contenders(self, backing, section):
        return list(dict.fromkeys(key[2] for key in self.samples if key[:2] == (backing, section)))

    def as_rows(self):
        names = ("backing", "section", "contender", "job")
        return [{**dict(zip(names, key)), "samples": samples} for key, samples in self.samples.items()]


def values(cell, metric):
    return [sample[metric] for sample in cell if sample.get(metric) is not None]


def spread(numbers):
    """(median, least, greatest), or None without numbers."""
    return (statistics.median(numbers), min(numbers), max(numbers)) if numbers else None


def of(cell, metric):
    return spread(values(cell, metric))


def ratio(cell, other, metric, other_metric=None):
    """This cell's figure over the other's: (median, least, greatest) over the rounds, or None."""
    pairs = [(one.get(metric), two.get(other_metric or metric)) for one, two in zip(cell, other)]
    return spread([one / two for one, two in pairs if one is not None and two])


def number(value):
    """For people: three significant digits or so."""
    if value >= 9_995:
        return f"{value / 1000:.1f}k" if value < 999_500 else f"{value / 1e6:.2f}M"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def text(triple):
    """`median (least-greatest)`."""
    if triple is None:
        return "-"
    median, least, greatest = (number(value) for value in triple)
    return median if least == greatest else f"{median} ({least}-{greatest})"
