"""The quickstart: one small video model, trained and sampled at any number of steps in minutes on a
laptop.
"""

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
