"""Shards on a real Ray cluster of two nodes on this machine: the same bits, also when a worker or a node is lost."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.pipeline import open_pipeline
from mpq_deploy.shards import cluster as module
from mpq_deploy.shards.cluster import Cluster
from mpq_deploy.shards.node import Facts
from mpq_deploy.shards.work import Alone
from mpq_deploy.sweep import run_sweep
from tests.pipeline.runs import Notes, build, recipe_for, save_denoiser, stage_bytes
from tests.shards.tasks import Task, job, shards
from tests.shards.test_processes import Heard, merged, same

pytest.importorskip("ray", reason="ray is not installed (pip install mpq-deploy[ray])")

PARTS = 6


@pytest.fixture(scope="module")
def nodes():
    """A head that computes nothing and two nodes of one processor each; yields the cluster of ray.cluster_utils."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster as Nodes

    small = {"object_store_memory": 80 << 20, "include_dashboard": False}
    found = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    for _ in range(2):
        found.add_node(num_cpus=1, **small)
    found.wait_for_nodes()
    try:
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def test_a_cluster_gives_the_bits_of_one_process(tmp_path, nodes):
    heard = Heard()
    meeting = {f"at{n}": Task(n, "meet", tmp_path / f"met-{n}") for n in range(2)}
    found = merged(Cluster(nodes.address), tmp_path / "job", shards(PARTS, **meeting), heard)
    same(found, merged(Alone(), tmp_path / "job", shards(PARTS)))
    pids = {int(result["pid"]) for result in found}
    assert os.getpid() not in pids and len(pids) == 2
    assert heard.warnings == ["opened with care"]
    assert heard.total == sum(heard.moves) == 3 * PARTS
    assert {str(result["threads"]) for result in found} == {os.environ["OMP_NUM_THREADS"]}


def test_a_killed_worker_changes_nothing(tmp_path, nodes):
    heard = Heard()
    once = shards(PARTS, at3=Task(3, "killed", tmp_path / "happened"))
    same(
        merged(Cluster(nodes.address), tmp_path / "job", once, heard), merged(Alone(), tmp_path / "job", shards(PARTS))
    )
    assert (tmp_path / "happened").exists()
    assert sum("part 3" in text for text in heard.warnings) == 1


def test_an_error_names_the_shard(tmp_path, nodes):
    with pytest.raises(ModelError) as caught:
        merged(Cluster(nodes.address), tmp_path / "job", shards(3, at1=Task(1, "model")))
    assert caught.value.hint == "Check the weights. It came from the shard 'part 1'."


@pytest.mark.slow
def test_a_build_on_the_cluster_has_the_bytes_of_one_process(tmp_path, nodes):
    model = save_denoiser(tmp_path)
    alone = build(recipe_for(model), tmp_path / "alone", "measure")
    notes, run = Notes(), tmp_path / "run"
    with open_pipeline(recipe_for(model), run, notes, Cluster(nodes.address)) as pipeline:
        pipeline.run_until("measure")
    made = ("export", "calibrate", "candidates", "measure")
    assert stage_bytes(run, made) == stage_bytes(alone.run, made)
    assert any("probes on 2 workers of a Ray cluster of 3 nodes" in line for line in notes.lines), notes.lines


@pytest.mark.slow
def test_a_worker_killed_while_it_measures_changes_nothing(tmp_path, nodes):
    """The stage that loses it, the sweep after it and its images: all of them as one process makes them."""
    model, changes = save_denoiser(tmp_path), {"measure__probes": 64, "measure__samples": 4}
    recipe, budgets = recipe_for(model, **changes), [0.35, 0.45, 0.6]
    with open_pipeline(recipe, tmp_path / "alone", Notes()) as pipeline:
        expected = run_sweep(pipeline, budgets, True)
    notes, run, ended, killed = Notes(), tmp_path / "run", threading.Event(), []
    build(recipe, run, "candidates")

    def kill():
        while not killed and not ended.is_set():
            for pid in computing():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                break

    killer = threading.Thread(target=kill)
    killer.start()
    with open_pipeline(recipe, run, notes, Cluster(nodes.address)) as pipeline:
        pipeline.run_until("measure")
        ended.set()
        killer.join()
        found = run_sweep(pipeline, budgets, True)
    assert killed and any("node was lost; the shard 'probes" in line for line in notes.lines), notes.lines
    made = ("export", "calibrate", "candidates", "measure", "controls")
    assert stage_bytes(run, made) == stage_bytes(tmp_path / "alone", made)
    assert found == expected and all("measured_nmse" in point for point in found["points"])
    assert any("measuring plans on 2 workers of a Ray cluster" in line for line in notes.lines), notes.lines


def computing():
    """The processes of Ray that compute a shard now: Ray names a process after what it runs."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdigit() and (place / "cmdline").read_bytes().startswith(b"ray::_OnRay.run"):
                found.append(int(place.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_a_killed_node_changes_nothing(tmp_path, nodes):
    """Last, since the cluster has one node less then."""
    told, heard = tmp_path / "pid", Heard()
    parts = shards(PARTS, at2=Task(2, "hang", told))

    def kill():
        while not (told.exists() and told.read_text()):
            time.sleep(0.05)
        # The node's raylet has started the worker: without it the node is gone, as when its machine is.
        raylet = next(
            line for line in Path(f"/proc/{told.read_text()}/status").read_text().splitlines() if "PPid" in line
        )
        os.kill(int(raylet.split()[1]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    found = merged(Cluster(nodes.address), tmp_path / "job", parts, heard)
    killer.join()
    same(found, merged(Alone(), tmp_path / "job", shards(PARTS)))
    assert any("node was lost" in text and "part 2" in text for text in heard.warnings)


def test_no_cluster_is_one_message(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def refused(**options):
        raise ConnectionError("nothing listens there")

    monkeypatch.setattr(ray, "init", refused)
    with pytest.raises(UsageError, match=r"no Ray cluster at '127\.0\.0\.1:1': nothing listens"):
        module.connected("127.0.0.1:1")


def test_files_arrive_whole_in_pieces(tmp_path, monkeypatch):
    from mpq_deploy.shards.node import Packed, unpacked

    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    pieces = {"a/b.bin": (np.arange(5, dtype=np.uint8), np.arange(3, dtype=np.uint8)), "empty": ()}
    packed, fetched = Packed("name", pieces), []

    def fetch(piece):
        fetched.append(piece)
        return piece

    folder = unpacked(packed, "node", fetch)
    assert (folder / "a/b.bin").read_bytes() == bytes([0, 1, 2, 3, 4, 0, 1, 2])
    assert (folder / "empty").read_bytes() == b""
    assert unpacked(packed, "node", fetch) == folder and len(fetched) == 2
    assert unpacked(packed, "other", fetch) != folder and len(fetched) == 4


def test_other_versions_are_refused_and_another_processor_is_said(tmp_path):
    ours, heard = Facts.here(), Heard()
    pool = module._ClusterPool(None, Cluster("auto"), job(tmp_path / "job"), heard, None)
    pool._compare(ours)
    assert not heard.warnings
    pool._compare(replace(ours, processor="none"))
    assert "another processor" in heard.warnings[0]
    older = replace(ours, versions=tuple((name, "0.1") for name, _ in ours.versions))
    with pytest.raises(UsageError, match=r"has mpq-deploy 0\.1, this machine"):
        pool._compare(older)
