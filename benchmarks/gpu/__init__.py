"""The parts of ``benchmarks/run_gpu.py``: what it measures, how it times, and how a run survives
what goes wrong.
"""
