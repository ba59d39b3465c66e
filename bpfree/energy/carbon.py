"""CO2-equivalents of a run: measured joules where there are any, what CodeCarbon says for the rest.

    with CarbonTracker("POL", folder=run_folder) as carbon:
        train()
    print(carbon.report(measured)["g_co2e"])

CodeCarbon works offline here. Its joules and its table of carbon intensities are used, not its grams: these are
multiplied here, after measured joules have taken the place of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import uuid4

from bpfree.energy.flags import Flag, explain
from bpfree.energy.result import EnergyResult
from bpfree.errors import UsageError

JOULES_PER_KWH = 3.6e6

MEASURE_S = 30.0
"""Time between two readings by CodeCarbon, s: rare, so as not to disturb the run. It takes differences of counters
and the mean load of each second, so nothing is lost in between; but it can undo only one wrap of a RAPL counter per
interval, and these may wrap within minutes."""

PART_OF_SCOPE = {"gpu board": "gpu", "cpu package": "cpu", "dram": "ram"}

CPU_HOW = {
    "cpu_load": "modelled: rated power and load",
    "constant": "modelled: half the rated power",
    "intel_rapl": "measured: rapl, by CodeCarbon",
    "windows_emi": "measured: Windows energy meter, by CodeCarbon",
    "intel_power_gadget": "measured: Intel Power Gadget, by CodeCarbon",
}
"""What CodeCarbon's modes for a CPU do. The rated power comes from a list of names, or is guessed."""


class CarbonTracker:
    """Follows the power of the machine during a `with` block; what fails in CodeCarbon is told in the report.

    The whole machine counts, so use one tracker per machine and run, and let the block be what the energy meter
    measures too. CodeCarbon's configuration files and variables are not followed, and the network is not used.

    Args:
        country: where the electricity comes from, ISO 3166 code of three letters.
        folder: takes CodeCarbon's own record, one CSV file per tracker, never shared; made if missing.

    Raises:
        UsageError: CodeCarbon is not installed, or has no carbon intensity for the country.
    """

    def __init__(self, country: str, *, folder: Path | str) -> None:
        with _hushed([]):
            self._intensity = carbon_intensity(country)
        self._folder = Path(folder)
        self._file = f"carbon-{uuid4().hex}.csv"
        self._tracker: Any = None
        self._parts = {name: _part(None, None, "not measured") for name in PART_OF_SCOPE.values()}
        self._failures: list[str] = []
        self._hush = ExitStack()

    def __enter__(self) -> CarbonTracker:
        self._hush.enter_context(_hushed(self._failures))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._tracker = _start(self._intensity["country"], self._folder, self._file)
        except Exception as error:  # whatever CodeCarbon raises must not end a training run
            self._failures.append(_one_line(error))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._hush:
            try:
                self._tracker.stop()
                self._parts = _parts(self._tracker)
            except Exception as failure:  # as above
                self._failures.append(_one_line(failure))

    def report(self, measured: EnergyResult | None = None) -> dict[str, Any]:
        """What the run cost, ready for JSON; to be called after the block.

        The totals `kwh` and `g_co2e` are None rather than too small where a part of the machine is unknown. Each
        part tells `how` its number came about and how many `seconds` it covers: the measured energy of a resumed
        run, for one, covers more than this block. `reason` is the first failure of CodeCarbon, if any.

        Args:
            measured: energy of the run, which replaces CodeCarbon's for the parts in its scope. Simulated energy
                replaces nothing and marks the whole report as simulated.
        """
        parts = dict(self._parts)
        included: list[str] = []
        simulated = measured is not None and Flag.SIMULATED.name in measured.flags
        if simulated:
            parts = {name: {**part, "how": f"simulated run; {part['how']}"} for name, part in parts.items()}
        elif measured is not None and measured.gross_j is not None:
            how = f"measured: {measured.method}"
            covered = [PART_OF_SCOPE[label] for label in measured.scope.split(" + ") if label in PART_OF_SCOPE]
            for name in covered[:1]:
                parts[name] = _part(measured.gross_j / JOULES_PER_KWH, measured.seconds, how)
            included = covered[1:]  # the joules of several parts together cannot be split
            for name in included:
                parts[name] = _part(None, measured.seconds, f"{how}, in the number of {covered[0]}")
        counted = [part["kwh"] for name, part in parts.items() if name not in included]
        kwh = None if None in counted else sum(counted)
        return {
            "kwh": kwh,
            "g_co2e": self._grams(kwh),
            "simulated": simulated,
            "parts": {name: {**part, "g_co2e": self._grams(part["kwh"])} for name, part in parts.items()},
            "intensity": self._intensity,
            "file": self._file if (self._folder / self._file).exists() else None,
            "reason": "; ".join([explain("SIMULATED")] * simulated + self._failures[:1]),
        }

    def _grams(self, kwh: float | None) -> float | None:
        return None if kwh is None else float(kwh * self._intensity["g_per_kwh"])


def carbon_intensity(country: str) -> dict[str, Any]:
    """Grams of CO2 equivalents per kWh in a country, and where that number is from.

    Args:
        country: ISO 3166 code of three letters, in any case.

    Raises:
        UsageError: CodeCarbon is not installed, or has no carbon intensity for the country.
    """
    country = country.upper()
    try:
        from codecarbon import __version__
        from codecarbon.input import DataSource
    except ImportError as error:
        raise UsageError('CO2 needs CodeCarbon: pip install "bpfree[carbon]"') from error
    data = DataSource()
    table = data.get_global_energy_mix_data()
    entry = table.get(country, {})
    if not entry.get("carbon_intensity"):  # CodeCarbon itself would go on with 475 g/kWh, or with 0
        raise UsageError(
            f"CodeCarbon has no carbon intensity for country {country!r}; "
            f"give one of its {len(table)} codes of three letters, such as DEU, FRA, GBR, JPN, POL, SWE, USA"
        )
    return {
        "g_per_kwh": entry["carbon_intensity"],
        "country": country,
        "year": entry["year"],
        "source": f"codecarbon {__version__}, {data.config['global_energy_mix_data_path']}",
    }


def _start(country: str, folder: Path, file: str) -> Any:
    """A running tracker. It would take what is not given from .codecarbon.config files and CODECARBON_* variables, so
    everything that changes a number or opens a connection is given."""
    from codecarbon import OfflineEmissionsTracker, OutputMethod

    tracker = OfflineEmissionsTracker(
        country_iso_code=country,
        country_2letter_iso_code=None,
        region=None,
        cloud_provider=None,
        cloud_region=None,
        electricitymaps_api_token="",  # None would let a co2_signal_api_token in
        force_carbon_intensity_g_co2e_kwh=None,
        emissions_endpoint=None,
        output_methods=[OutputMethod.CSV],  # neither API nor PROMETHEUS nor LOGFIRE
        output_handlers=[],
        output_dir=str(folder),
        output_file=file,
        on_csv_write="append",
        api_call_interval=-1,  # write once, at the end
        tracking_mode="machine",  # "process" narrows CPU and memory but not GPUs: parts that do not add up
        measure_power_secs=MEASURE_S,
        gpu_ids=None,
        force_cpu_power=None,
        force_ram_power=None,
        force_mode_cpu_load=False,
        rapl_include_dram=False,
        rapl_prefer_psys=False,
        pue=1.0,
        wue=0.0,
        allow_multiple_runs=True,
        project_name="bpfree",
        log_level="warning",  # the level of the exceptions that it swallows, see _hushed
        logger_preamble="",
    )
    tracker.start()
    return tracker


def _parts(tracker: Any) -> dict[str, dict[str, Any]]:
    """CodeCarbon's numbers, and how it got them: the latter it tells in private attributes only."""
    import torch

    data = tracker.final_emissions_data
    hardware = {getattr(item, "chip_part", type(item).__name__).lower(): item for item in tracker._hardware}
    parts = {}
    for name in PART_OF_SCOPE.values():
        kwh = getattr(data, f"{name}_energy")
        item = hardware.get(name)
        if kwh > 0:
            parts[name] = _part(kwh, data.duration, _how(item))
        elif name == "gpu" and not getattr(item, "gpu_ids", None) and not torch.cuda.is_initialized():
            parts[name] = _part(0.0, data.duration, "none")
        else:  # a board without counter, or one that CodeCarbon missed, makes it say 0
            parts[name] = _part(None, data.duration, "not measured")
    return parts


def _how(item: Any) -> str:
    kind = type(item).__name__
    if kind == "RAM":
        return "modelled: memory modules guessed from the size"
    if kind == "CPU":
        return CPU_HOW.get(item._mode, f"unknown: {item._mode}, by CodeCarbon")
    if kind == "GPU":
        boards = [board for board in item.devices.devices if board.gpu_index in item.gpu_ids]
        source = "sampled power" if any(board.last_energy is None for board in boards) else "energy counters"
        return f"measured: {source} of {len(boards)} board(s), by CodeCarbon"
    return f"unknown: {kind}, by CodeCarbon"


def _part(kwh: float | None, seconds: float | None, how: str) -> dict[str, Any]:
    return {"kwh": kwh, "seconds": seconds, "how": how}


@contextmanager
def _hushed(failures: list[str]) -> Iterator[None]:
    """Keep CodeCarbon's log off our stderr. It swallows its own exceptions and logs them: collect those."""

    def listen(record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[1]:
            failures.append(_one_line(record.exc_info[1]))
        return False

    log = logging.getLogger("codecarbon")
    log.addFilter(listen)
    try:
        yield
    finally:
        log.removeFilter(listen)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
