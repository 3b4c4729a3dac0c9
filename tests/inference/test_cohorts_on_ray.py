"""A cohort on a real Ray cluster on this machine: workers are killed, all cases come out right and none twice."""

import os
import signal
from contextlib import suppress

import pytest
from small_models import make_volume

from voxdino.cohort.dispatch import Cohort
from voxdino.cohort.predicting import Models, Spread
from voxdino.cohort.ray_crew import RayCrew
from voxdino.core.io import write_volume
from voxdino.inference.cases import find_cases
from voxdino.inference.load import load_model
from voxdino.inference.run import predict_cases
from voxdino.inference.settings import PredictSettings

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1800)]

NUM_CASES = 200
KILLS_AT = (40, 110)
NUM_STARTS = 5


@pytest.fixture
def cluster():
    for _ in range(NUM_STARTS):
        with suppress(Exception):  # on a busy machine a node does not start within the half minute that Ray allows
            ray.init(
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=80_000_000,
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                _system_config={"worker_niceness": 0},  # as RayCrew starts one; 15 is for machines that do other work
            )
            break
        ray.shutdown()
    assert ray.is_initialized()
    yield
    ray.shutdown()


def kill_a_worker(crew):
    with suppress(ray.exceptions.RayError):  # its answer
        pid = ray.get(crew._actors[0].__ray_call__.remote(lambda _: os.getpid()))
        os.kill(pid, signal.SIGKILL)


def test_two_workers_are_killed_and_all_cases_are_right_and_none_twice(cluster, run_folder, tmp_path):
    for number in range(NUM_CASES):
        write_volume(tmp_path / "in" / f"c{number:03}.nii.gz", make_volume(seed=number))
    cases, settings = find_cases([tmp_path / "in"]), PredictSettings(amp="off")
    crew, lost, progress = RayCrew(), [], []

    def watch(done, total):
        progress.append((done, total))
        if done in KILLS_AT:
            kill_a_worker(crew)

    spread = Spread(Cohort(crew, on_note=lost.append), Models((run_folder,), device="cpu"))
    model = load_model(run_folder)
    together = predict_cases(cases, model, tmp_path / "together", settings=settings, spread=spread, on_progress=watch)
    assert crew.size == 2
    assert (together.num_done, together.num_kept) == (NUM_CASES, 0)
    assert progress == [(done + 1, NUM_CASES) for done in range(NUM_CASES)]  # each exactly once
    alone = predict_cases(cases, model, tmp_path / "alone", settings=settings)
    assert together.record == alone.record  # with the digest of every label map
    assert all("it is tried again" in note for note in lost)
    again = predict_cases(cases, model, tmp_path / "together", settings=settings, spread=spread)
    assert (again.num_done, again.num_kept) == (0, NUM_CASES)
