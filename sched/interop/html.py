"""A trace as one HTML page: the chart, its figures, and memory over time.

The page holds all it needs. It fetches nothing and runs no script, and says so
to the browser; every name in it is escaped.
"""

from __future__ import annotations

from fractions import Fraction
from html import escape

from pipeproof.sched.exact import Number
from pipeproof.sched.interop.svg import draw_curve, draw_svg
from pipeproof.sched.memory import Ledger
from pipeproof.sched.trace import Trace

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px;
  padding: 0 1rem; color: #222; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.wide { overflow-x: auto; } .curves { display: flex; flex-wrap: wrap; gap: 1rem; }
table { border-collapse: collapse; } td, th { padding: .15rem 1rem .15rem 0;
  text-align: left; border-bottom: 1px solid #eee; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
small { color: #555; }
"""


def draw_html(trace: Trace, *, title: str | None = None) -> str:
    """The page.

    Args:
        trace: predicted or measured.
        title: default the schedule's name and sizes.

    Raises:
        ParameterError: as `draw_svg`.
    """
    schedule = trace.program.schedule
    heading = escape(title or schedule.summary)
    chart = draw_svg(trace, title=title)
    notes = "".join(f"<p>Note: {escape(note)}.</p>" for note in trace.notes)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{heading}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{heading}</h1>
<p><small>{escape(trace.source)} by pipeproof; schedule digest
{schedule.digest[:16]}…</small></p>
{notes}<div class="wide">
{chart}</div>
<h2>Figures</h2>
<table>
{_figures(trace)}
</table>
<h2>Memory</h2>
{_memory(trace)}
</body>
</html>
"""


def _figures(trace: Trace) -> str:
    rows: list[tuple[str, Number, str]] = [
        ("makespan", trace.makespan, "start of the step to its last end"),
        ("ideal", trace.ideal, "busy time of a device, in the mean"),
        ("bubble_fraction", trace.bubble_fraction, "idle / (devices × makespan)"),
        ("bubble_ratio", trace.bubble_ratio, "idle per device / ideal"),
        ("span", trace.span, "longest of a device's first start to last end"),
        ("span_bubble", trace.span_bubble, "1 − ideal / span"),
        ("peak_activations", max(trace.peak_activations), "most on any device"),
    ]
    if (peaks := trace.peak_bytes) is not None:
        rows.append(("peak_bytes", max(peaks), "most on any device"))
    return "\n".join(
        f"<tr><th>{name}</th><td class='n'>{_show(value)}</td><td>{what}</td></tr>"
        for name, value, what in rows
    )


def _memory(trace: Trace) -> str:
    if (peaks := trace.peak_bytes) is not None:
        unit, curves = "bytes", trace.memory
    else:
        unit, peaks = "micro-batch activations", trace.peak_activations
        curves = Ledger(trace, trace.sizes.activations).curve
    top = max(peaks)
    pictures = []
    for device, peak in enumerate(peaks):
        curve = curves(device)
        title = f"device {device}: peak {_show(peak)} {unit}"
        pictures.append(
            draw_curve(
                curve.time.tolist(),
                curve.total.tolist(),
                title=title,
                end=trace.makespan,
                top=top,
            )
        )
    about = f"<p><small>{unit} alive over time; same scale for all</small></p>"
    return f"{about}\n<div class='curves'>\n" + "\n".join(pictures) + "\n</div>"


def _show(number: Number) -> str:
    if isinstance(number, Fraction):
        return f"{float(number):,.6g} ({number})"
    return f"{number:,}" if isinstance(number, int) else f"{number:,.6g}"
