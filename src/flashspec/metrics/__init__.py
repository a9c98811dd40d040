"""What a run did, measured on the host: acceptance, latency, throughput."""

from flashspec.metrics.acceptance import AcceptanceTracker
from flashspec.metrics.latency import LatencyTracker
from flashspec.metrics.throughput import ThroughputTracker

__all__ = ["AcceptanceTracker", "LatencyTracker", "ThroughputTracker"]
