"""Approximate training as a compiler pass: `torch.compile(model, backend="approx")`."""

from graphpass.errors import ApproxError, ConfigError
from graphpass.method import methods
from graphpass.options import Options
from graphpass.plan import Decision, Plan
from graphpass.report import Report, Row, reports
from graphpass.schedule import Schedule
from graphpass.session import Session, session

__all__ = [
    "ApproxError",
    "ConfigError",
    "Decision",
    "Options",
    "Plan",
    "Report",
    "Row",
    "Schedule",
    "Session",
    "methods",
    "reports",
    "session",
]
