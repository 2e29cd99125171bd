"""Settings of every test run."""

import os

# XLA compiles anew in every run, and longer than a tiny model computes.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}".strip()
