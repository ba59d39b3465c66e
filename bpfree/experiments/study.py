"""The Optuna side of tuning: one study that several processes share, and that outlives any of them."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import optuna
import sqlalchemy.exc
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from bpfree.errors import CheckpointError, UsageError, WriteError

STARTUP_TRIALS: Final = 10
"""Trials drawn at random before TPE has something to learn from, and before the pruner judges."""
CANDIDATES: Final = 24
SQLITE_WAIT_S: Final = 120.0
OWNER: Final = "worker"

REPORTS: Final = 10
"""Times in the life of a trial at which the pruner may judge it: at every tenth of the epochs planned."""
WARMUP_REPORTS: Final = 3
"""The pruner leaves a trial alone until it has made this many reports: schedules with large rates start slowly."""


Direction = Literal["maximize", "minimize"]


class SeededSampler(BaseSampler):
    """TPE whose random numbers for a trial depend on the seed and the trial's number alone.

    Optuna seeds a sampler once per process: a resumed study would repeat the first random trials, and two workers with
    one seed would draw the same. Here a study that was killed goes on as if it had not been.

    Args:
        seed: of the study.
        objectives: number of objectives.
    """

    def __init__(self, seed: int, objectives: int = 1) -> None:
        self.settings: dict[str, Any] = {
            "n_startup_trials": STARTUP_TRIALS,
            "n_ei_candidates": CANDIDATES,
            "multivariate": objectives == 1,  # Optuna's own choice, which its next version may change
            "constant_liar": True,
        }
        self._seed = seed
        self.reseed_rng()

    def reseed_rng(self) -> None:
        """Forget the trial: Optuna calls this when it forks threads, which each begin with `before_trial`."""
        self._tpe = self._for_trial(0)

    def _for_trial(self, number: int) -> TPESampler:
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        return TPESampler(seed=seed, **self.settings)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._tpe = self._for_trial(trial.number)
        self._tpe.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        space: dict[str, BaseDistribution] = self._tpe.infer_relative_search_space(study, trial)
        return space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        values: dict[str, Any] = self._tpe.sample_relative(study, trial, search_space)
        return values

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._tpe.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._tpe.after_trial(study, trial, state, values)


def make_pruner(name: str) -> tuple[optuna.pruners.BasePruner, dict[str, Any]]:
    """The pruner called `name`, and its settings for the record."""
    if name == "none":
        return optuna.pruners.NopPruner(), {}
    settings: dict[str, Any] = {
        "n_startup_trials": STARTUP_TRIALS,
        "n_warmup_steps": WARMUP_REPORTS,
        "interval_steps": 1,
        "n_min_trials": 1,
    }
    return optuna.pruners.MedianPruner(**settings), settings


def open_storage(where: str) -> optuna.storages.BaseStorage:
    """The storage that `where` names: a database by its URL, or the path of a journal file.

    Raises:
        UsageError: it cannot be opened.
    """
    try:
        if "://" not in where:
            Path(where).parent.mkdir(parents=True, exist_ok=True)
            return optuna.storages.JournalStorage(JournalFileBackend(where))
        patient = {"connect_args": {"timeout": SQLITE_WAIT_S}} if where.startswith("sqlite:") else {}
        return optuna.storages.RDBStorage(where, engine_kwargs=patient)
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, OSError, ValueError) as error:
        kind = where.partition("://")[0] if "://" in where else where  # a URL may hold a password
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"cannot open the storage {kind} ({reason}); give a database URL such as sqlite:///tune.db, or a path"
        ) from error


@contextmanager
def told_of_storage() -> Iterator[None]:
    """Turn what Optuna and its database raise when the storage fails into one line."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        reason: BaseException = error
        while reason.__cause__ is not None:  # the database says more than those who call it
            reason = reason.__cause__
        words = str(reason).strip().splitlines()[0]
        raise WriteError(
            f"the storage of the study fails ({words}); free some space if it is full, and give the same command again"
        ) from error


class SharedStudy:
    """A study with a number of trials to do, as one worker sees it.

    Workers take turns at a file lock to take up trials, so that no more are begun than were asked for. Each holds a
    lock of its own while it lives, which the system lifts when it dies in whatever way: the trial that it leaves behind
    is then taken up by another, under the same number and with the same values.

    Args:
        name: of the study within its storage.
        storage: see `open_storage`.
        folder: where the locks are; all workers share it.
        settings: what makes the study what it is, plain values; compared with those of an existing one.
        trials: number of trials, with those of earlier sessions.
        seed: of the sampler.
        pruner: "median" or "none".
        directions: of each objective.

    Raises:
        UsageError: the storage cannot be opened, or holds a study of this name with other settings.
    """

    def __init__(
        self,
        name: str,
        storage: str,
        folder: Path,
        *,
        settings: dict[str, Any],
        trials: int,
        seed: int,
        pruner: str,
        directions: list[Direction],
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.trials = trials
        self._locks = folder / ".locks"
        self._locks.mkdir(parents=True, exist_ok=True)
        self._turn = FileLock(self._locks / "turn.lock")
        self._token = ""
        self.sampler = SeededSampler(seed, len(directions))
        self.pruner, self.pruner_settings = make_pruner(pruner)
        with self._turn:
            self.study = optuna.create_study(
                storage=open_storage(storage),
                sampler=self.sampler,
                pruner=self.pruner,
                study_name=name,
                directions=directions,
                load_if_exists=True,
            )
            known = self.study.user_attrs.setdefault("settings", settings)
            if known == settings:
                self.study.set_user_attr("settings", settings)
        if known != settings:
            raise UsageError(f"there is a study {name!r} with {_difference(known, settings)}; give this one a --name")

    @contextmanager
    def working(self) -> Iterator[None]:
        """Be alive in the eyes of other workers."""
        self._token = secrets.token_hex(8)
        with FileLock(self._lock_of(self._token)):
            yield
        if not any(trial.user_attrs.get(OWNER) == self._token for trial in self.running()):
            self._lock_of(self._token).unlink(missing_ok=True)
        self._token = ""

    def take(self) -> optuna.Trial | None:
        """A trial to do: one that its worker left behind, or a new one; None if there are as many as wanted."""
        with self._turn:
            for left in self.running():
                if not self._alive(left.user_attrs.get(OWNER, "")):
                    return self._own(optuna.Trial(self.study, left._trial_id))  # the storage keeps number and values
            begun = [trial for trial in self.all() if trial.state != TrialState.WAITING]
            return self._own(self.study.ask()) if len(begun) < self.trials else None

    def _own(self, trial: optuna.Trial) -> optuna.Trial:
        trial.set_user_attr(OWNER, self._token)
        return trial

    def all(self) -> list[FrozenTrial]:
        """Every trial in order of its number."""
        trials: list[FrozenTrial] = self.study.get_trials(deepcopy=False)
        return trials

    def running(self) -> list[FrozenTrial]:
        """Trials without an end, by workers alive or dead."""
        return [trial for trial in self.all() if trial.state == TrialState.RUNNING]

    def ended(self) -> list[FrozenTrial]:
        """Trials that have ended, in whatever way."""
        return [trial for trial in self.all() if trial.state.is_finished()]

    def finish(self, trial: optuna.Trial, values: list[float]) -> None:
        """The trial has the value of each objective."""
        self.study.tell(trial, values)

    def abandon(self, trial: optuna.Trial, shortfall: float | None = None) -> None:
        """The trial has no value: it was pruned, or it failed.

        A failure too is told as pruned, since TPE ignores trials that Optuna calls failed and would go on proposing
        learning rates that diverge.

        Args:
            trial: that has ended.
            shortfall: how far it stayed from what was sought. TPE ranks pruned trials by it, behind all that have a
                value; without it they are all alike, and where few trials reach the target it would learn nothing.
        """
        if shortfall is not None:
            trial.report(shortfall, 1)
        with warnings.catch_warnings():
            self.study.tell(trial, state=TrialState.PRUNED)

    def _lock_of(self, token: str) -> Path:
        return self._locks / f"{token}.lock"

    def _alive(self, token: str) -> bool:
        path = self._lock_of(token)
        if not token or not path.exists():
            return False
        try:
            with FileLock(path, timeout=0):
                path.unlink(missing_ok=True)  # nobody will ask again: its trial gets another worker
                return False
        except Timeout:
            return True
        except OSError as error:
            raise CheckpointError(f"cannot lock {path}: {error.strerror}") from error


def _difference(known: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Where two sets of settings differ first, in words."""
    for name in {**known, **wanted}:
        before, now = known.get(name), wanted.get(name)
        if isinstance(before, dict) and isinstance(now, dict) and before != now:
            return _difference(before, now)
        if before != now:
            return f"{name} {before!r} instead of {now!r}"
    return "other settings"
