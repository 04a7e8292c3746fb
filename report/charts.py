"""The plots of the page, as Plotly figures. Colours of text and grid come from the page, which knows light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from . import prose
from .baselines.names import PATTERN
from .records import Row

BUNDLE, BASELINE = "#0f9488", "#8d99ae"
FAMILY_COLORS = ("#8d99ae", "#c77b30", "#5b7db1", "#a3527b", "#6b8e4e", "#7d6bb0", "#b08d57", "#4f9da6")
ROW_HEIGHT, MARGIN = 30, 70  # pixels of one bar, and of the axis
ROOM_ABOVE = 4.0  # dB between the best inexact row and the line of those that are equal


def latency_bars(rows: Sequence[Row]) -> str:
    """Median latency of each row, with the deciles as whiskers."""
    import plotly.graph_objects as go

    shown = list(reversed(rows))
    medians = [row.latency_ms.median for row in shown]
    bars = go.Bar(
        x=medians,
        y=[escape(row.name) for row in shown],
        orientation="h",
        marker_color=[BUNDLE if row.kind == "bundle" else BASELINE for row in shown],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [max(row.latency_ms.p90 - row.latency_ms.median, 0) for row in shown],
            "arrayminus": [max(row.latency_ms.median - row.latency_ms.p10, 0) for row in shown],
            "thickness": 1,
            "width": 3,
            "color": "#888888",
        },
        hovertemplate="%{y}: %{x:.1f} ms<extra></extra>",
    )
    ends = [max(row.latency_ms.p90, row.latency_ms.median) for row in shown]
    labels = go.Scatter(
        x=ends,
        y=bars.y,
        mode="text",
        text=[f" {prose.milliseconds(value)}" for value in medians],
        textposition="middle right",
        cliponaxis=False,
        hoverinfo="skip",
    )
    figure = go.Figure([bars, labels])
    figure.update_xaxes(title_text="latency, ms", range=[0, 1.12 * max(ends)])
    figure.update_yaxes(ticksuffix="  ", showgrid=False)
    figure.update_layout(showlegend=False)
    return _html(figure, MARGIN + ROW_HEIGHT * len(rows))


def quality_over_cost(rows: Sequence[Row]) -> str | None:
    """Mean PSNR over latency, a line for each family of baselines; None when no row has a PSNR."""
    import plotly.graph_objects as go

    known = [row for row in rows if row.psnr_db is not None]
    if not known:
        return None
    ceiling = _ceiling(known)
    figure = go.Figure()
    colors = iter(FAMILY_COLORS * (1 + len(known) // len(FAMILY_COLORS)))
    for family, members in families(known).items():
        bundle = members[0].kind == "bundle"
        color = BUNDLE if bundle else next(colors)
        figure.add_trace(
            go.Scatter(
                x=[row.latency_ms.median for row in members],
                y=[min(_psnr(row), ceiling) for row in members],
                name=escape(family),
                mode="markers+text" if len(members) == 1 else "lines+markers+text",
                text=[f"<b>{escape(row.name)}</b>" if bundle else str(row.evaluations or "") for row in members],
                textposition="top center",
                cliponaxis=False,
                line={"dash": "dot", "width": 1.5, "color": color},
                marker={"size": 15 if bundle else 8, "symbol": "star" if bundle else "circle", "color": color},
                customdata=[
                    [escape(row.name), prose.milliseconds(row.latency_ms.median), prose.decibels(_psnr(row))]
                    for row in members
                ],
                hovertemplate="%{customdata[0]}: %{customdata[1]}, %{customdata[2]}<extra></extra>",
            )
        )
    if any(_psnr(row) >= prose.EXACT_DB for row in known):
        figure.add_hline(y=ceiling, line_dash="dash", line_width=1, line_color="#888888")
        figure.update_yaxes(**_ticks(known, ceiling))
    figure.update_xaxes(title_text="latency, ms (log)", type="log", tickformat="~s", dtick="D2")
    figure.update_yaxes(title_text="PSNR against the full loop, dB")
    figure.update_layout(showlegend=True, legend={"orientation": "h", "yanchor": "top", "y": -0.18, "x": 0})
    return _html(figure, 480)


def tried_schedules(tried: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any] | None) -> str:
    """PSNR over evaluations of everything the schedule search measured on validation samples."""
    import plotly.graph_objects as go

    figure = go.Figure()
    origins = dict.fromkeys(entry["origin"] for entry in tried)
    for origin, color in zip(origins, (BUNDLE, *FAMILY_COLORS * len(origins)), strict=False):
        members = sorted((e for e in tried if e["origin"] == origin), key=lambda entry: entry["evaluations"])
        figure.add_trace(
            go.Scatter(
                x=[entry["evaluations"] for entry in members],
                y=[min(entry["validation_psnr_db"], prose.EXACT_DB) for entry in members],
                name=escape(str(origin)),
                mode="lines+markers",
                line={"width": 1.5, "color": color},
                marker={"size": 7},
                hovertemplate="%{x} evaluations: %{y:.1f} dB<extra></extra>",
            )
        )
    if chosen is not None:
        figure.add_trace(
            go.Scatter(
                x=[chosen["evaluations"]],
                y=[min(chosen["validation_psnr_db"], prose.EXACT_DB)],
                name="chosen",
                mode="markers",
                marker={"size": 16, "symbol": "circle-open", "color": BUNDLE, "line": {"width": 2}},
                hovertemplate="chosen<extra></extra>",
            )
        )
    figure.update_layout(showlegend=True)
    figure.update_xaxes(title_text="evaluations", rangemode="tozero")
    figure.update_yaxes(title_text="PSNR on validation, dB")
    return _html(figure, 340)


def families(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that differ in the number of steps only, from fast to slow; each bundle is a family of its own."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        match = PATTERN.fullmatch(row.name) if row.kind == "baseline" else None
        family = row.name if match is None else match["engine"] + (f" · {match['solver']}" if match["solver"] else "")
        found.setdefault(family, []).append(row)
    return {name: sorted(members, key=lambda row: row.latency_ms.median) for name, members in found.items()}


def plotly_script() -> str:
    """The source of plotly.js, to be written into the page."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _psnr(row: Row) -> float:
    assert row.psnr_db is not None
    return row.psnr_db.mean


def _ceiling(rows: Sequence[Row]) -> float:
    """Where rows that equal the reference are drawn: a little above the best of the others."""
    inexact = [_psnr(row) for row in rows if _psnr(row) < prose.EXACT_DB]
    return max(inexact, default=50.0) + ROOM_ABOVE


def _ticks(rows: Sequence[Row], ceiling: float) -> dict[str, Any]:
    """Ticks every 2, 5 or 10 dB below the line of the rows that equal the reference, which has its name."""
    lowest = min(min(_psnr(row), ceiling) for row in rows)
    distance = next(d for d in (2, 5, 10) if ceiling - lowest <= 5 * d or d == 10)
    values = [float(v) for v in range(int(lowest // distance) * distance, int(ceiling - 1), distance)]
    names = [f"{value:.0f}" for value in values]
    return {"tickmode": "array", "tickvals": [*values, ceiling], "ticktext": [*names, "equal"]}


def _html(figure: Any, height: int) -> str:
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": 30, "t": 24, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#777777"},
    )
    figure.update_xaxes(gridcolor="rgba(128,128,128,0.25)", zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor="rgba(128,128,128,0.25)", zeroline=False, automargin=True)
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False, "responsive": True})
