"""Train one small video model and sample it at any number of steps: the quickstart."""

from anyflow.demo.config import DemoConfig, Stage
from anyflow.demo.progress import DemoProgress
from anyflow.demo.run import REPORT_FILE, finished_report, run_demo
from anyflow.demo.world import World

__all__ = [
    "REPORT_FILE",
    "DemoConfig",
    "DemoProgress",
    "Stage",
    "World",
    "finished_report",
    "run_demo",
]
