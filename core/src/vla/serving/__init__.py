"""Serving a policy to robots: `vla serve`. Imported by that verb only; needs the extra `vla-core[serve]`.

- protocol.py: what a protocol part has to do; openpi.py and vla_eval.py are two of them
- sessions.py: one inference thread, newest wins per robot, round robin between robots
- server.py: connections, health, shutting down; metrics.py: what Prometheus reads
- contract.py: what a policy wants and gives; live.py: the page at /
- run.py: from options to a running server; check.py: `vla serve --check`
"""
