"""What ``/metrics`` tells Prometheus. Each app has a registry of its own."""

from collections.abc import Callable

from minillm.errors import missing_package

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
GAUGES = {
    "n_running": ("requests_running", "Requests that are being answered."),
    "n_waiting": ("requests_waiting", "Requests in the queue."),
    "n_pages": ("pages", "Pages of keys and values."),
}
COUNTERS = {
    "n_prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "n_cached_tokens": ("cached_tokens", "Tokens of prompts whose keys and values were in pages already."),
    "n_new_tokens": ("new_tokens", "Tokens of answers; its rate is the number of tokens per second."),
    "n_preempted": ("preemptions", "Times a request lost its pages to an older one."),
    "n_steps": ("steps", "Forward passes of the model."),
}


class Metrics:
    """The metrics of one server.

    Args:
        stats: returns the engine's ``Stats``.

    Raises:
        UserError: prometheus-client is not installed.
    """

    def __init__(self, stats: Callable):
        try:
            import prometheus_client
            import prometheus_client.core
        except ImportError:
            raise missing_package("prometheus-client", purpose="the server's /metrics", extra="serve") from None
        self._client, self._stats = prometheus_client, stats
        self._registry = prometheus_client.CollectorRegistry()
        common = {"registry": self._registry, "namespace": "minillm"}
        self.requests = prometheus_client.Counter(
            "http_requests", "Finished HTTP requests.", ["path", "status"], **common
        )
        self.first_token_s = prometheus_client.Histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", buckets=SECONDS, **common
        )
        self.request_s = prometheus_client.Histogram(
            "request_seconds", "From a request's arrival to the end of its answer.", buckets=SECONDS, **common
        )
        self._registry.register(self)

    def collect(self):
        """Yield the engine's figures; the registry calls this for every page."""
        stats, families = self._stats(), self._client.core
        for name, (title, text) in GAUGES.items():
            yield families.GaugeMetricFamily(f"minillm_{title}", text, value=getattr(stats, name))
        in_use = stats.n_pages - stats.n_free_pages
        yield families.GaugeMetricFamily("minillm_pages_in_use", "Pages that requests hold.", value=in_use)
        for name, (title, text) in COUNTERS.items():
            yield families.CounterMetricFamily(f"minillm_{title}", text, value=getattr(stats, name))

    def page(self) -> tuple[bytes, str]:
        """Return the text of ``/metrics`` and its content type."""
        return self._client.generate_latest(self._registry), self._client.CONTENT_TYPE_LATEST
