"""What the machine does while a stage runs: processor, memory, disk, network and GPU, as MLflow's own collectors measure it."""

from __future__ import annotations

import logging
import threading
import time

SECONDS = 10.0  # between samples, as in MLflow


class SystemMetrics:
    """Samples of the machine, taken in a thread of its own until `stop`, and handed over by `take`.

    MLflow's own monitor sends from its thread; here the stage sends, so that a server that does not answer is noticed in one place
    and the thread draws no random number (MLflow's retries do).
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._collectors = [CPUMonitor(), DiskMonitor(), NetworkMonitor(), *_gpu()]
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._seconds = seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rediffuse-system-metrics", daemon=True)
        self._collect()  # the load of the processor is that since the last call, so the first value says nothing
        self._thread.start()

    def take(self) -> list[tuple[float, dict[str, float]]]:
        """(seconds since the epoch, {"system/...": value}) of each sample since the last call."""
        samples, self._samples = self._samples, []
        return samples

    def stop(self) -> None:
        """End the thread, with a last sample, so that a short stage has one as well."""
        self._stopped.set()
        self._thread.join()
        self._samples.append((time.time(), self._collect()))

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            self._samples.append((time.time(), self._collect()))

    def _collect(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for collector in self._collectors:
            collector.collect_metrics()
            values |= {f"system/{name}": float(value) for name, value in collector.aggregate_metrics().items()}
            collector.clear_metrics()
        return values


def _gpu() -> list[object]:
    """The collector of the first kind of GPU that is there, if any."""
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    for kind in (GPUMonitor, ROCMMonitor):
        try:
            return [kind()]
        except Exception:  # no library, no driver, no GPU: the collectors raise various errors
            logging.getLogger(__name__).debug("no %s", kind.__name__, exc_info=True)
    return []
