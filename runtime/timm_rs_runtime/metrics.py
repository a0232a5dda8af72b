"""Statistics of sessions for Prometheus; needs prometheus_client"""
from typing import Any, Callable, Dict, Iterator, Mapping

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
except ImportError as e:
    raise ImportError('Metrics for Prometheus need the packages of: pip install prometheus_client.') from e

__all__ = ['Collector']

_METRICS = {
    'requests': ('requests_total', 'Requests served, by resolution.'),
    'misses': ('deadline_misses_total', 'Requests served later than their budget.'),
    'rejected': ('rejected_total', 'Requests refused because too many were waiting.'),
    'failed': ('failed_total', 'Requests that ended in another error.'),
    'queue': ('queue_length', 'Requests that wait.'),
    'resolution': ('resolution_pixels', 'Resolution chosen last.'),
    'slowdown': ('slowdown_ratio', 'Recent latency of inference against that at the start.'),
    'reading_ms': ('reading_seconds_total', 'Time spent on decoding images.'),
    'network_ms': ('network_seconds_total', 'Time spent on resizing images and on inference.'),
    'expected_reading_ms': ('expected_reading_seconds', 'Expected time to decode the last request, by resolution.'),
    'expected_ms': ('expected_seconds', 'Expected time of an image once it is decoded, by resolution.'),
    'budget_ms': ('budget_seconds', 'Budget of a request.'),
}  # by their keys in AdaptiveSession.stats()


class Collector:
    """What prometheus_client shows of sessions.

    Args:
        stats: Returns AdaptiveSession.stats() of each session, by name.

    Example:
        >>> from prometheus_client import REGISTRY, start_http_server
        >>> REGISTRY.register(Collector(lambda: {'here': session.stats()}))    # doctest: +SKIP
        >>> start_http_server(9000)    # doctest: +SKIP
    """

    def __init__(self, stats: Callable[[], Mapping[str, Dict[str, Any]]]):
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        found = self._stats()
        for key, (name, text) in _METRICS.items():
            family = CounterMetricFamily if name.endswith('_total') else GaugeMetricFamily
            labels = ('session', 'resolution') if key.startswith(('requests', 'expected')) else ('session',)
            metric = family(f'timm_rs_{name}', text, labels=labels)
            scale = 1e-3 if key.endswith('_ms') else 1
            for session, stats in found.items():
                values = stats[key].items() if len(labels) > 1 else [(None, stats[key])]
                for resolution, value in values:
                    metric.add_metric([session, str(resolution)][:len(labels)], scale * value)
            yield metric
