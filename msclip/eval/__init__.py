"""Evaluation of an exported model: a task in, a result out. No Ray in here; `pipelines.evaluate` spreads the work."""

from msclip.eval.results import checkpoint_digest, evaluate_checkpoint, is_current, task_digest
from msclip.eval.retrieval import Hits, retrieve
from msclip.eval.tasks import Task, parse_tasks
from msclip.eval.zeroshot import build_classifier

__all__ = [
    "Hits",
    "Task",
    "build_classifier",
    "checkpoint_digest",
    "evaluate_checkpoint",
    "is_current",
    "parse_tasks",
    "retrieve",
    "task_digest",
]
