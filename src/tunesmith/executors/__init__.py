"""Where units of work run: this process, processes of their own, a Ray cluster, a Dask cluster.

A unit is a picklable function of picklable arguments, and may be run twice: what it writes is the same.
"""

from tunesmith.executors.address import executor_of
from tunesmith.executors.cluster import ClusterExecutor, WorkerLostError
from tunesmith.executors.workers import Workers, retried_by, workers_of

__all__ = ["ClusterExecutor", "WorkerLostError", "Workers", "executor_of", "retried_by", "workers_of"]
