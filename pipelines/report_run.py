"""What a report needs to know of a run, read from its folder alone; whatever is missing is empty, not an error."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from jaxtyping import Float

from msclip import checkpoint, metrics_log
from msclip.errors import UserError
from msclip.storage import Folder
from pipelines.report_bad_rows import BadRows, read_bad_rows

CONFIG, EVALUATION = "config.yaml", "evaluation"


@dataclass(frozen=True)
class RunRecord:
    """One run, as its folder tells it."""

    folder: Folder
    metrics: dict[str, Float[np.ndarray, " records"]]
    """Columns of metrics.jsonl by name, ascending in "step"; NaN where a record has no finite value."""
    results: tuple[dict[str, Any], ...]
    """Evaluation results of this run's checkpoints, by task, then step."""
    unreadable: tuple[str, ...]
    """Evaluation files that are not whole."""
    quarantine: tuple[BadRows, ...]
    """Of the stages that recorded anything."""
    config_text: str
    config: dict[str, Any]
    state: dict[str, Any]
    """The newest finished checkpoint's record."""
    checkpoints: tuple[Folder, ...]
    """Finished ones, oldest first."""

    @property
    def name(self) -> str:
        return self.folder.name

    def setting(self, path: str) -> Any:
        """A value of the resolved config by its dotted name; None where there is none."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def tasks(self) -> dict[str, list[dict[str, Any]]]:
        """Results by task, each ascending in step; those of averaged weights apart."""
        grouped: dict[str, list[dict[str, Any]]] = {}
        for result in self.results:
            averaged = result["weights"] == "ema"
            grouped.setdefault(f"{result['dataset']} (EMA)" if averaged else result["dataset"], []).append(result)
        return grouped


def read_run(url: str) -> RunRecord:
    """Reads a run's folder.

    Raises:
        UserError: there is no such folder, or nothing was trained in it.
    """
    folder = Folder(url)
    if not folder.exists():
        raise UserError(f"run must be the folder of a training run, and nothing is at {url!r}")
    records = metrics_log.read(folder)
    if not records:
        raise UserError(
            f"run must be the folder of a training run with a {metrics_log.METRICS} that holds at least one record, "
            f"got {url!r}; train first, or give the folder that pipelines.train named"
        )
    config_text = folder.read_text(CONFIG) if folder.exists(CONFIG) else ""
    config = yaml.safe_load(config_text) or {}
    checkpoints = tuple(checkpoint.finished(folder))
    results, unreadable = _results(folder)
    return RunRecord(
        folder=folder,
        metrics=_columns(records),
        results=results,
        unreadable=unreadable,
        quarantine=read_bad_rows(folder, config),
        config_text=config_text,
        config=config,
        state=checkpoint.read_state(checkpoints[-1]) if checkpoints else {},
        checkpoints=checkpoints,
    )


def _columns(records: list[dict[str, Any]]) -> dict[str, Float[np.ndarray, " records"]]:
    by_step = {record["step"]: record for record in records}
    ordered = [by_step[step] for step in sorted(by_step)]
    names = dict.fromkeys(name for record in ordered for name, value in record.items() if isinstance(value, int | float))
    columns = {name: np.array([record.get(name, np.nan) for record in ordered], dtype=np.float64) for name in names}
    finite = {name: np.where(np.isfinite(column), column, np.nan) for name, column in columns.items()}
    return {name: column for name, column in finite.items() if not np.isnan(column).all()}


def _results(run: Folder) -> tuple[tuple[dict[str, Any], ...], tuple[str, ...]]:
    results, unreadable = [], []
    root = run / EVALUATION
    for name in root.names("step_*"):
        for file in (root / name).names("*.json"):
            try:
                result = json.loads((root / name).read_text(file))
                step, _, weights = name.removeprefix("step_").partition("-")
                result |= {"step": int(step), "weights": weights or "model"}
                _ = result["dataset"], result["task"], result["metrics"].items()
            except (ValueError, KeyError, AttributeError, UnicodeDecodeError):
                unreadable.append(f"{EVALUATION}/{name}/{file}")
            else:
                results.append(result)
    return tuple(sorted(results, key=lambda r: (r["task"], r["dataset"], r["weights"], r["step"]))), tuple(unreadable)
