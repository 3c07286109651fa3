"""SVG by hand: bars with their spread, and lines. No library is needed, and any browser shows them."""

from xml.sax.saxutils import escape

from .figures import number

COLOURS = ["#1b6ca8", "#e07a1f", "#3a9d5d", "#b33a3a", "#7a5ba6", "#8c6d46", "#d06fa4", "#6b6b6b", "#a5a32c", "#2ba6b8", "#333333"]
FONT = 'font-family="sans-serif"'
PANEL_WIDTH, BAR_HEIGHT, NAME_WIDTH, VALUE_WIDTH, COLUMNS = 520, 18, 150, 70, 2
HEAD, PANEL_GAP = 40, 18
LINE_WIDTH, LINE_HEIGHT, LEFT, BOTTOM = 720, 320, 70, 40


def document(width, height, title, body):
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    back = f'<rect width="{width}" height="{height}" fill="white"/>'
    name = f'<text x="12" y="24" font-size="16" font-weight="bold" {FONT}>{escape(title)}</text>'
    return "\n".join([head, back, name, *body, "</svg>", ""])


def text(x, y, what, size=12, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" {FONT}>{escape(what)}</text>'


def colours_of(names):
    return {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(dict.fromkeys(names))}


def panel(x, y, name, bars, colours):
    """One job: a bar for each contender, as long as its median, with a line from the least to the greatest."""
    room = PANEL_WIDTH - NAME_WIDTH - VALUE_WIDTH
    scale = room / max((triple[2] for _, triple in bars), default=1)
    parts = [text(x, y + 12, name, 13)]
    for at, (contender, (median, least, greatest)) in enumerate(bars):
        top = y + 20 + at * BAR_HEIGHT
        middle, left = top + BAR_HEIGHT / 2 - 1, x + NAME_WIDTH
        parts += [
            text(left - 6, middle + 4, contender, 11, "end"),
            f'<rect x="{left}" y="{top}" width="{max(median * scale, 1):.1f}" height="{BAR_HEIGHT - 4}" fill="{colours[contender]}"/>',
            f'<line x1="{left + least * scale:.1f}" x2="{left + greatest * scale:.1f}" y1="{middle}" y2="{middle}" stroke="black"/>',
            text(left + greatest * scale + 5, middle + 4, number(median), 11),
        ]
    return parts


def bars(title, panels):
    """`panels`: (job, [(contender, (median, least, greatest))])."""
    colours = colours_of(name for _, rows in panels for name, _ in rows)
    height = 20 + BAR_HEIGHT * max(len(rows) for _, rows in panels) + PANEL_GAP
    body = []
    for at, (job, rows) in enumerate(panels):
        body += panel(12 + at % COLUMNS * PANEL_WIDTH, HEAD + at // COLUMNS * height, job, rows, colours)
    lines_of_panels = (len(panels) + COLUMNS - 1) // COLUMNS
    return document(COLUMNS * PANEL_WIDTH + 24, HEAD + lines_of_panels * height, title, body)


def lines(title, series):
    """`series`: (name, [(seconds, operations/s)])."""
    points = [point for _, one in series for point in one]
    if not points:
        return document(LINE_WIDTH, 60, title, [text(12, 48, "nothing measured")])
    x_max, y_max = max(max(x for x, _ in points), 0.001), max(max(y for _, y in points), 1) * 1.05
    at = lambda x, y: (LEFT + x / x_max * (LINE_WIDTH - LEFT - 20), HEAD + LINE_HEIGHT * (1 - y / y_max))
    body, colours = [], colours_of(name for name, _ in series)
    for share in (0, 0.25, 0.5, 0.75, 1):
        (x, y), (right, _) = at(0, y_max * share), at(x_max, 0)
        body += [f'<line x1="{x:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>', text(x - 6, y + 4, number(y_max * share), 11, "end")]
        x, y = at(x_max * share, 0)
        body.append(text(x, y + 18, f"{x_max * share:.1f} s", 11, "middle"))
    for row, (name, one) in enumerate(series):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in one))
        body.append(f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>')
        low = HEAD + LINE_HEIGHT + BOTTOM + row * 18
        body += [f'<rect x="{LEFT}" y="{low - 9}" width="12" height="10" fill="{colours[name]}"/>', text(LEFT + 18, low, name, 12)]
    return document(LINE_WIDTH, HEAD + LINE_HEIGHT + BOTTOM + len(series) * 18 + 10, title, body)
