"""What Prometheus reads at /metrics. Every server has a registry of its own, so that several live in one process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made = {"registry": self.registry}
        self.requests = Counter("vla_requests", "Requests by how they ended", ["outcome"], **made)
        self.connections = Counter("vla_connections", "Connections by how they began", ["outcome"], **made)
        self.sessions = Gauge("vla_sessions", "Robots connected now", **made)
        self.waiting = Gauge("vla_waiting_requests", "Requests whose turn has not come", **made)
        self.wait = Histogram("vla_queue_wait_seconds", "From arrival to its turn", buckets=SECONDS, **made)
        self.infer = Histogram("vla_infer_seconds", "One forward pass", buckets=SECONDS, **made)
        self.total = Histogram("vla_request_seconds", "From arrival to the answer", buckets=SECONDS, **made)
        self.batch = Histogram("vla_batch_rows", "Robots in one forward pass", buckets=(1, 2, 4, 8, 16, 32), **made)
        self.lag = Histogram("vla_loop_lag_seconds", "How late the event loop is", buckets=SECONDS, **made)
        self.nonfinite = Counter("vla_nonfinite_actions", "Chunks with NaN or infinite values, never sent", **made)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)
