"""Turn the results of GPU runs into docs/performance.md."""
