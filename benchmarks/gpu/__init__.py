"""Provide the parts of ``benchmarks/run_gpu.py``: sections, and how a run survives errors."""
