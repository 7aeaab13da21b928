"""Every Prometheus instrument, defined once and passed in. Names start with `explainserve_`; docs/metrics.md lists
them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_ERRORS = (1e-6, 1e-5, 1e-4, 1e-3, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class Metrics:
    """The instruments of one server.

    Args:
        registry: where they are registered; each server has its own.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "explainserve_requests", "Finished RPCs by method and status code.", ["method", "code"], registry=registry
        )
        self.request_seconds = Histogram(
            "explainserve_request_seconds", "Duration of RPCs.", ["method"], buckets=_SECONDS, registry=registry
        )
        self.active_requests = Gauge(
            "explainserve_active_requests", "RPCs being answered.", ["method"], registry=registry
        )
        self.queue_seconds = Histogram(
            "explainserve_queue_seconds",
            "Wait of a plan's first row for the device.",
            ["model", "device"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.compute_seconds = Histogram(
            "explainserve_compute_seconds",
            "Duration of micro-batches.",
            ["model", "device"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.serialize_seconds = Histogram(
            "explainserve_serialize_seconds",
            "Time for statistics and encoding of one response.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.rows = Counter(
            "explainserve_rows",
            "Rows, each with one forward evaluation, by kind: forward or gradient.",
            ["model", "device", "kind"],
            registry=registry,
        )
        self.backward_evaluations = Counter(
            "explainserve_backward_evaluations",
            "Backward evaluations of gradient rows, one for each target that shares them.",
            ["model", "device"],
            registry=registry,
        )
        self.batch_rows = Histogram(
            "explainserve_batch_rows", "Rows per micro-batch.", ["model", "device"], buckets=_ROWS, registry=registry
        )
        self.failed_batches = Counter(
            "explainserve_failed_batches",
            "Micro-batches that failed, also where their rows were answered afterwards in others.",
            ["model", "device", "reason"],
            registry=registry,
        )
        self.lost_threads = Gauge(
            "explainserve_lost_threads",
            "Threads in runs of models that cannot be ended.",
            ["device"],
            registry=registry,
        )
        self.waiting_rows = Gauge(
            "explainserve_waiting_rows", "Rows that wait for the device.", ["device"], registry=registry
        )
        self.reserved_bytes = Gauge(
            "explainserve_reserved_bytes",
            "Memory that requests which are being answered may hold, their messages until they are sent included.",
            registry=registry,
        )
        self.convergence_delta = Histogram(
            "explainserve_relative_convergence_delta",
            "|sum of attributions - (F(x) - F(x'))| / |F(x) - F(x')| per map.",
            ["model", "method"],
            buckets=_ERRORS,
            registry=registry,
        )
        self.map_error = Histogram(
            "explainserve_map_error",
            "Estimated relative L2 error per map.",
            ["model", "method"],
            buckets=_ERRORS,
            registry=registry,
        )
        self.step_count = Histogram(
            "explainserve_step_count",
            "Gradient evaluations per map.",
            ["model", "method"],
            buckets=_ROWS,
            registry=registry,
        )
        self.attributions = Counter(
            "explainserve_attributions", "Maps by stop reason.", ["model", "method", "stop_reason"], registry=registry
        )
        self.response_cache_lookups = Counter(
            "explainserve_response_cache_lookups",
            "Explain requests by outcome in the response cache: hit or miss.",
            ["model", "outcome"],
            registry=registry,
        )
        self.response_cache_bytes = Gauge(
            "explainserve_response_cache_bytes", "Memory of the answers that are kept.", registry=registry
        )
        self.models = Gauge("explainserve_models", "Model versions by state.", ["state"], registry=registry)
