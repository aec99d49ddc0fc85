"""Samples models at several numbers of steps, measures the videos, and keeps both in a folder that
can be resumed.
"""

from anyflow.evaluation.runs.record import RECORD_FILE, EvaluationRecord, MetricRecord, ModelRecord

__all__ = ["RECORD_FILE", "EvaluationRecord", "MetricRecord", "ModelRecord"]
