"""Settings of every test run."""

import os

# XLA compiles anew in every run, and longer than a tiny model computes: 7 times less with these.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()
