"""What scripts/bench, bench-tls and bench-scale share. Python's standard library only.

    server.py      programs that serve, started and ended by their own id; CPU time; the release binary
    contenders.py  each thing that is measured, and what of it is installed
    fio.py         one run of one job of benches/fio, and its figures
    matrix.py      contenders x jobs, interleaved, over one transport on one backing
    resync.py      clients during a resync, and a resync during clients
    bitmap.py      the write-intent bitmap on against off, from a cold start
    figures.py     medians, spreads, ratios between samples of the same round
    machine.py     the header: machine, versions, how quiet it was
    targets.py     what is wanted, what was measured, met or missed
    report.py      Markdown and JSON
    plot.py        SVG
"""
