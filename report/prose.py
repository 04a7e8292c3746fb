"""Numbers as a person reads them, and the sentences at the top of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .records import Report, Row

EXACT_DB = 100.0  # from here on samples are equal but for rounding: 1e-5 of the range


def milliseconds(value: float) -> str:
    """Three digits: `8.42 ms`, `197 ms`, `4.91 s`."""
    if value >= 9999.5:
        return f"{value / 1000:.1f} s"
    if value >= 999.5:
        return f"{value / 1000:.2f} s"
    return f"{value:.0f} ms" if value >= 99.5 else f"{value:.3g} ms"


def seconds(value: float) -> str:
    """`0.4 s`, `12 s`, `3 min 20 s`."""
    if value >= 120:
        return f"{int(value // 60)} min {int(value % 60)} s"
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s"


def size(value: float) -> str:
    """`812 B`, `7.2 MB`, `1.31 GB`; powers of ten."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f} B"


def quantity(value: float) -> str:
    """`6.12 M`, `1.45 G`, `320`."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f}"


def decibels(value: float) -> str:
    """`40.2 dB`, or `equal` where only rounding differs."""
    return "equal" if value >= EXACT_DB else f"{value:.1f} dB"


def tail(psnr: Mapping[str, Any]) -> str:
    """The worse samples of a PSNR: `5th percentile 36.1 dB, worst 33.0 dB`."""
    percentile = "" if psnr.get("p05") is None else f"5th percentile {decibels(psnr['p05'])}, "
    return f"{percentile}worst {decibels(psnr['min'])}"


def proof_words(proof: Mapping[str, Any]) -> str:
    """How close the unoptimized program is to its pipeline: `equal latents and images ... 2 samples`."""
    if "skipped" in proof:
        return (
            f"skipped ({proof['skipped']}); whether the unoptimized program draws what the pipeline draws is not known"
        )
    image = "" if proof["image_db"] is None else f", images {proof['image_db']:.1f} dB"
    return (
        f"the unoptimized program against the pipeline's own code: latents {proof['latent_db']:.1f} dB{image} (the worst of "
        f"{proof['samples']} samples)"
    )


def pass_costs(passes: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """What each pass cost in dB: the PSNR before it less the PSNR after it; None where nothing was measured.

    The first lossy pass has the captured model before it, whose samples are the reference: its PSNR says all.
    """
    costs: list[float | None] = []
    before = None
    for entry in passes:
        after = entry.get("psnr_db")
        costs.append(None if before is None or after is None else before - after)
        before = before if after is None else after
    return costs


def drift(value: float) -> str:
    """A relative error: `1.1 %`, `3e-07`, `0`."""
    if value == 0:
        return "0"
    return f"{100 * value:.2g} %" if value >= 5e-4 else f"{value:.0e}"


def times(value: float) -> str:
    """A ratio: `24.9×`."""
    return f"{value:.1f}×" if value >= 1.95 else f"{value:.2f}×"


def headlines(report: Report) -> list[str]:
    """What to say first about each bundle, and which baseline comes nearest."""
    found = []
    for row in report.rows:
        if row.kind == "bundle":
            rival = nearest_rival(row, report.rows)
            found.append(_headline(row, report) + (_rivalry(row, rival) if rival is not None else ""))
    return found


def nearest_rival(bundle: Row, rows: Sequence[Row]) -> Row | None:
    """The fastest baseline whose mean PSNR is at least that of the bundle."""
    if bundle.psnr_db is None:
        return None
    least = min(bundle.psnr_db.mean, EXACT_DB)
    equal = [row for row in rows if row.kind == "baseline" and row.psnr_db is not None and row.psnr_db.mean >= least]
    return min(equal, key=lambda row: row.latency_ms.median, default=None)


def _headline(row: Row, report: Report) -> str:
    count = report.protocol.count or 1
    what = "answers one call" if row.evaluations is None else f"makes {count} sample{'s' if count > 1 else ''}"
    text = f"{row.name} {what} in {milliseconds(row.latency_ms.median)}"
    if row.speedup is not None:
        text += f", {times(row.speedup)} {'the speed of' if row.speedup < 1 else 'as fast as'} eager PyTorch"
    if row.psnr_db is not None:
        quality = "equal to" if row.psnr_db.mean >= EXACT_DB else f"{row.psnr_db.mean:.1f} dB from"
        worse = "" if row.psnr_db.min >= EXACT_DB else f" ({tail(row.psnr_db.model_dump())})"
        text += f"; its samples are {quality} those of the full loop{worse}"
    elif row.drift is not None:
        text += f"; its output differs by {drift(row.drift)} from that of the checkpoint"
    return text + "."


def _rivalry(bundle: Row, rival: Row) -> str:
    ratio = rival.latency_ms.median / bundle.latency_ms.median
    text = f" The fastest baseline of at least its quality is {rival.name} at {milliseconds(rival.latency_ms.median)}"
    if ratio >= 1:
        return f"{text}, {times(ratio)} the time."
    return f"{text}: that baseline wins."
