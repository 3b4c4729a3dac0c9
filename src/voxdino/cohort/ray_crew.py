"""Workers on a Ray cluster: one actor each, replaced when it or its machine dies."""

from collections.abc import Callable
from typing import Any

from voxdino.cohort.crew import Answer
from voxdino.core.errors import ResourceError
from voxdino.preparation.workers import attempt, available_cpus


class RayCrew:
    """See `Crew`. address: ray://host:port; None: the cluster that runs on this machine, else one started here.

    num_gpus: of each worker, whose number is that of the cluster's GPUs then, and else of its processors.
    Errors: ResourceError without Ray, or where no cluster answers at the address.
    """

    def __init__(self, address: str | None = None, *, num_gpus: float = 0.0) -> None:
        try:
            import ray
        except ImportError as error:
            fact = f"--on ray needs Ray, which is not here ({error})."
            raise ResourceError(fact, fix="pip install 'voxdino[ray]', or use --on local.") from error
        self._ray = ray
        if not ray.is_initialized():
            self._connect(address)
        resources = ray.cluster_resources()
        each = resources.get("GPU", 0) / num_gpus if num_gpus else resources.get("CPU", 1)
        self.size = max(1, int(each))
        self._class = ray.remote(num_cpus=1, num_gpus=num_gpus, max_restarts=0)(_Worker)
        self._actors: list[Any] = []
        self._asked: dict[Any, int] = {}  # reference to what comes -> worker

    def _connect(self, address: str | None) -> None:
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if address is not None:
                self._ray.init(address=address, **quiet)
                return
            try:
                self._ray.init(
                    include_dashboard=False,
                    num_cpus=available_cpus(),
                    _system_config={"worker_niceness": 0},  # what is asked for is no work of the background
                    **quiet,
                )
            except ValueError:  # a cluster runs here already: its processors are its own business
                self._ray.init(address="auto", **quiet)
        except Exception as error:  # a node that does not start in time is one without a name
            fact = f"no Ray cluster answers ({str(error).splitlines()[0] if str(error) else type(error).__name__})."
            raise ResourceError(fact, where=address or "ray", fix="check ray status on its head node.") from error

    def start(self, task: Callable[[Any], Any]) -> None:
        self._task = self._ray.put(task)
        self._actors = [None] * self.size
        for worker in range(self.size):
            self._hire(worker)

    def give(self, worker: int, index: int, item: Any, name: str) -> None:
        self._asked[self._actors[worker].work.remote(index, item, name)] = worker

    def wait(self, timeout_s: float) -> list[tuple[int, Answer]]:
        found, _ = self._ray.wait(list(self._asked), num_returns=1, timeout=timeout_s)
        return [self._answer(reference) for reference in found]

    def _answer(self, reference: Any) -> tuple[int, Answer]:
        worker = self._asked.pop(reference)
        try:
            return worker, self._ray.get(reference)
        except self._ray.exceptions.RayError:  # the actor, or its machine, is gone
            self._hire(worker)
            return worker, "lost"

    def replace(self, worker: int) -> None:
        self._asked = {reference: number for reference, number in self._asked.items() if number != worker}
        self._ray.kill(self._actors[worker])
        self._hire(worker)

    def stop(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors, self._asked = [], {}

    def _hire(self, worker: int) -> None:
        self._actors[worker] = self._class.remote(self._task)
        self._asked[self._actors[worker].ready.remote()] = worker


class _Worker:
    """What lives on the cluster."""

    def __init__(self, task: Callable[[Any], Any]) -> None:
        self._task = task

    def ready(self) -> str:
        return "ready"

    def work(self, index: int, item: Any, name: str) -> Any:
        return attempt(self._task, item, index, name)
