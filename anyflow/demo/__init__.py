"""Train one small video model and sample it at any number of steps: the quickstart."""

from anyflow.demo.causal_results import CAUSAL_REPORT_FILE, causal_takeaway
from anyflow.demo.causal_run import finished_causal_report, run_causal_demo
from anyflow.demo.config import CausalDemoConfig, DemoConfig, Stage
from anyflow.demo.progress import DemoProgress
from anyflow.demo.run import REPORT_FILE, finished_report, run_demo
from anyflow.demo.world import World

__all__ = [
    "CAUSAL_REPORT_FILE",
    "REPORT_FILE",
    "CausalDemoConfig",
    "DemoConfig",
    "DemoProgress",
    "Stage",
    "World",
    "causal_takeaway",
    "finished_causal_report",
    "finished_report",
    "run_causal_demo",
    "run_demo",
]
