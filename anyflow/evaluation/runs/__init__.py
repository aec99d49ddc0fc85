"""Sample models at several step counts and measure the videos, in a folder that can be resumed."""

from anyflow.evaluation.runs.record import RECORD_FILE, EvaluationRecord, MetricRecord, ModelRecord

__all__ = ["RECORD_FILE", "EvaluationRecord", "MetricRecord", "ModelRecord"]
