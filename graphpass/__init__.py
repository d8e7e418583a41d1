"""Approximate training as a compiler pass: `torch.compile(model, backend="approx")`."""

# Loaded before the function `methods` takes the name: importing a folder binds it in its parent.
import graphpass.methods  # noqa: F401
from graphpass.budget import AccuracyDrop, Speedup
from graphpass.dry_run import plan
from graphpass.errors import ApproxError, ConfigError
from graphpass.method import methods
from graphpass.options import Options
from graphpass.plan import Decision, Plan
from graphpass.recipes import recipe
from graphpass.report import Report, Row, reports
from graphpass.schedule import Schedule
from graphpass.session import Session, session
from graphpass.sparse import sparse_model, sparse_weights
from graphpass.tune import Tuned, tune

__all__ = [
    "AccuracyDrop",
    "ApproxError",
    "ConfigError",
    "Decision",
    "Options",
    "Plan",
    "Report",
    "Row",
    "Schedule",
    "Session",
    "Speedup",
    "Tuned",
    "methods",
    "plan",
    "recipe",
    "reports",
    "session",
    "sparse_model",
    "sparse_weights",
    "tune",
]
