"""What can be measured on this machine and how, and why not."""

from __future__ import annotations

import importlib.metadata
from contextlib import closing
from typing import Any

from bpfree.energy.choose import visible_sources
from bpfree.energy.rapl import RaplSource
from bpfree.energy.sources import PowerSource, SourceUnavailableError


def survey() -> list[dict[str, Any]]:
    """One row per thing that could be measured or modelled, ready for JSON.

    Each has "what", "measured" (a bool), "how" (the counter and the kinds of power that answer, or what is missing) and
    "details" (what the source says of itself). No CUDA context is made.
    """
    return [*_boards(), _host(), _carbon()]


def _boards() -> list[dict[str, Any]]:
    try:
        sources = visible_sources()
    except SourceUnavailableError as error:
        return [_missing("gpu board", str(error))]
    rows = []
    for index, source in enumerate(sources):
        with closing(source):
            rows.append(_row(f"gpu board cuda:{index}", source))
    return rows


def _host() -> dict[str, Any]:
    try:
        source = RaplSource()
    except SourceUnavailableError as error:
        return _missing("cpu package + dram", str(error))
    with closing(source):
        return _row(source.scope, source)


def _carbon() -> dict[str, Any]:
    what = "CO2 equivalents"
    try:
        version = importlib.metadata.version("codecarbon")
    except importlib.metadata.PackageNotFoundError:
        return _missing(what, 'CodeCarbon is not installed: pip install "bpfree[carbon]"')
    how = f"modelled by CodeCarbon {version} from measured joules where there are some"
    return {"what": what, "measured": False, "how": how, "details": {}}


def _row(what: str, source: PowerSource) -> dict[str, Any]:
    powers = [name for name, read in source.powers().items() if read() is not None]
    counter = f"{source.name}, new every {1e3 * source.update_period_s:.0f} ms" if not source.reason else source.reason
    also = f"; also {', '.join(powers)}" if powers else ""
    status = source.status()
    busy = "; other processes compute on it" if status.foreign_processes else ""
    return {
        "what": what,
        "measured": True,
        "how": counter + also + busy,
        "details": {
            **source.info(),
            "powers": powers,
            "temperature_c": status.temperature_c,
            "foreign_processes": status.foreign_processes,
            "calibration": source.calibrated,
            "idle_w": source.idle_w,
        },
    }


def _missing(what: str, reason: str) -> dict[str, Any]:
    return {"what": what, "measured": False, "how": reason, "details": {}}
