"""Shards on a real Ray cluster of two nodes on this machine: the same bits, also when a worker or a node is lost."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpq_deploy.errors import ModelError, UsageError
from mpq_deploy.evaluate.metrics import measure_images as metrics_module
from mpq_deploy.evaluate.metrics.measure_images import MetricsOptions, measure_metrics
from mpq_deploy.run.pipeline import open_pipeline
from mpq_deploy.studies import compared_losses as losses_module
from mpq_deploy.studies.audit import AuditOptions, run_audit
from mpq_deploy.studies.sweep import run_sweep
from mpq_deploy.system.parallel import cluster as module
from mpq_deploy.system.parallel.cluster import Cluster
from mpq_deploy.system.parallel.node import Facts
from mpq_deploy.system.parallel.work import Alone, ShardError, run_shards
from tests.pipeline.runs import Notes, build, recipe_for, save_denoiser, stage_bytes
from tests.pipeline.test_audit import CHANGES, without_seconds
from tests.pipeline.test_metrics import Quarters
from tests.system.parallel.tasks import Task, job, shards
from tests.system.parallel.test_processes import Heard, merged, same

pytest.importorskip("ray", reason="ray is not installed (pip install mpq-deploy[ray])")

PARTS = 6
# Seconds that a node may take to come or to go on a busy machine.
PATIENCE = 120


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
    found.wait_for_nodes(PATIENCE)
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
        merged(Cluster(nodes.address), tmp_path / "job", once, heard),
        merged(Alone(), tmp_path / "job", shards(PARTS)),
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
    for name in ("calibration", "rounding", "salient channels", "probes"):
        assert any(
            f"{name} on 2 workers of a Ray cluster of 3 nodes" in line for line in notes.lines
        ), notes.lines


@pytest.mark.slow
def test_workers_killed_while_they_round_change_nothing(tmp_path, nodes):
    model = save_denoiser(tmp_path)
    alone = build(recipe_for(model), tmp_path / "alone", "candidates")
    run = Path(shutil.copytree(alone.run, tmp_path / "run"))
    shutil.rmtree(run / "candidates")
    notes = Notes()
    with (
        open_pipeline(recipe_for(model), run, notes, Cluster(nodes.address)) as pipeline,
        killing(notes) as killed,
    ):
        pipeline.run_until("candidates")
    assert killed and lost(notes), notes.lines
    assert stage_bytes(run, ("candidates",)) == stage_bytes(alone.run, ("candidates",))


@pytest.mark.slow
def test_a_worker_killed_while_it_measures_changes_nothing(tmp_path, nodes):
    """The stage that loses it, the sweep after it and its images: all of them as one process makes them."""
    model, changes = save_denoiser(tmp_path), {"measure__probes": 64, "measure__samples": 4}
    recipe, budgets = recipe_for(model, **changes), [0.35, 0.45, 0.6]
    with open_pipeline(recipe, tmp_path / "alone", Notes()) as pipeline:
        expected = run_sweep(pipeline.current("measure", "controls"), budgets, True)
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
        found = run_sweep(pipeline.current("measure", "controls"), budgets, True)
    assert killed and any("node was lost; the shard 'probes" in line for line in notes.lines), (
        notes.lines
    )
    made = ("export", "calibrate", "candidates", "measure", "controls")
    assert stage_bytes(run, made) == stage_bytes(tmp_path / "alone", made)
    assert found == expected and all("measured_nmse" in point for point in found["points"])
    assert any("measuring plans on 2 workers of a Ray cluster" in line for line in notes.lines), (
        notes.lines
    )


def computing():
    """The processes of Ray that compute a shard now: Ray names a process after what it runs."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdigit() and (place / "cmdline").read_bytes().startswith(
                b"ray::_OnRay.run"
            ):
                found.append(int(place.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_an_audit_with_killed_workers_is_that_of_one_process(tmp_path, nodes, monkeypatch):
    monkeypatch.setattr(losses_module, "SHARD", 12)
    recipe = recipe_for(save_denoiser(tmp_path), **CHANGES)
    options, found = AuditOptions((0.35, 0.5), ("probe", "size-only"), 30), []
    for crew in (None, Cluster(nodes.address)):
        notes, run = Notes(), tmp_path / f"run-{len(found)}"
        with open_pipeline(recipe, run, notes, crew) as pipeline, killing(notes) as killed:
            found.append(
                without_seconds(
                    json.loads(
                        json.dumps(run_audit(pipeline.current("candidates"), options).as_json())
                    )
                )
            )
    assert found[0] == found[1]
    parts = [
        f"audit-{name}" for name in ("exhaustive-000", "exhaustive-001", "exhaustive-002", "probe")
    ]
    assert stage_bytes(tmp_path / "run-1", parts) == stage_bytes(tmp_path / "run-0", parts)
    for name in ("exhaustive", "measuring plans"):
        assert any(f"{name} on 2 workers of a Ray cluster" in line for line in notes.lines), (
            notes.lines
        )
    assert len(killed) > 1 and lost(notes), notes.lines


@pytest.mark.slow
def test_metrics_with_a_killed_worker_are_those_of_one_process(tmp_path, nodes, monkeypatch):
    """The images, by their files, and what is measured on them."""
    monkeypatch.setattr(metrics_module, "check_networks", lambda names, options: None)
    monkeypatch.setattr(metrics_module, "open_network", lambda name, options: Quarters())
    recipe, first, found = recipe_for(save_denoiser(tmp_path)), tmp_path / "run-0", []
    build(recipe, first, "evaluate")
    runs = [first, Path(shutil.copytree(first, tmp_path / "run-1"))]
    for crew, run in zip((None, Cluster(nodes.address)), runs):
        notes = Notes()
        with open_pipeline(recipe, run, notes, crew) as pipeline:
            pipeline.run_until("evaluate")
            with killing(notes) as killed:
                made = measure_metrics(pipeline.run, MetricsOptions(images=256, workers=1))
        found.append((without_seconds(made.as_json()), stage_bytes(run, (".samples",))))
    assert found[0] == found[1] and len(found[0][1]) >= 3 * 256 // 32
    assert any("sampling on 2 workers of a Ray cluster" in line for line in notes.lines), (
        notes.lines
    )
    assert killed and lost(notes), notes.lines


@contextmanager
def killing(notes):
    """Kill one worker in the middle of each job that ``notes`` hear of; yield the processes killed."""
    ended, killed = threading.Event(), []

    def kill():
        while not ended.is_set():
            jobs = sum("of a Ray cluster of" in line for line in notes.lines)
            for pid in computing() if len(killed) < jobs else []:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                break
            time.sleep(0.001)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        ended.set()
        killer.join()


def lost(notes):
    return any("a worker or its node was lost; the shard" in line for line in notes.lines)


@contextmanager
def another_node(nodes, temporary):
    """A third computing node, whose workers write their files below ``temporary``; yields its id."""
    import ray

    node = nodes.add_node(
        num_cpus=1,
        object_store_memory=80 << 20,
        include_dashboard=False,
        env_vars={"TMPDIR": str(temporary)},
    )
    try:
        nodes.wait_for_nodes(PATIENCE)
        yield node.node_id
    finally:
        nodes.remove_node(node)
        until = time.monotonic() + PATIENCE
        while any(found["NodeID"] == node.node_id and found["Alive"] for found in ray.nodes()):
            assert time.monotonic() < until, "the node is still there"
            time.sleep(0.1)


@contextmanager
def small_disk(folder):
    """A file system of 256 kB on ``folder``; skips where this process may mount none."""
    folder.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder],
            capture_output=True,
            check=False,
        ).returncode
    ):
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


class Telling(Heard):
    """Writes a file when a node is left out."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def warn(self, text):
        super().warn(text)
        if "the work continues without it" in text:
            self.told.touch()


def over_all(nodes, root, heard):
    """Compute shards that wait until a node is left out; the job's files are larger than a small disk."""
    given = job(root, files=("file.txt", "big"))
    (root / "big").write_bytes(bytes(1 << 20))
    parts = shards(PARTS, **{f"at{n}": Task(n, f"wait for {heard.told}") for n in range(PARTS)})
    with Cluster(nodes.address).open(given, heard) as pool:
        return list(run_shards(pool, "parts", parts, heard))


def left_out(heard):
    return [text for text in heard.warnings if "the work continues without it" in text]


@pytest.mark.slow
def test_a_node_with_a_full_disk_is_left_out_by_name(tmp_path, nodes):
    heard = Telling(tmp_path / "told")
    with small_disk(tmp_path / "small") as small, another_node(nodes, small) as node:
        found = over_all(nodes, tmp_path / "job", heard)
        assert not list(small.rglob("big")), "half of the files were left behind"
    same(found, merged(Alone(), tmp_path / "job", shards(PARTS)))
    (said,) = left_out(heard)
    assert node[:8] in said and "its disk is full" in said and str(small) in said


@pytest.mark.slow
def test_a_node_whose_folder_cannot_be_used_is_left_out_by_name(tmp_path, nodes):
    """Simulated: a file is where the folder would be made. (Root may write wherever permissions forbid it.)"""
    (tmp_path / "temporary").mkdir()
    (tmp_path / "temporary" / f"mpq-deploy-{os.getuid()}").touch()
    heard = Telling(tmp_path / "told")
    with another_node(nodes, tmp_path / "temporary") as node:
        found = over_all(nodes, tmp_path / "job", heard)
    same(found, merged(Alone(), tmp_path / "job", shards(PARTS)))
    (said,) = left_out(heard)
    assert node[:8] in said and f"its folder {tmp_path / 'temporary'} cannot be used" in said


def test_a_disk_that_fills_in_the_middle_of_a_shard_leaves_its_node_out(tmp_path, nodes):
    """Simulated: the shard raises what the system would. One worker was requested: it goes to the other node."""
    heard = Heard()
    parts = shards(
        PARTS, **{f"at{n}": Task(n, f"full once {tmp_path / 'node'}") for n in range(PARTS)}
    )
    found = merged(Cluster(nodes.address, workers=1), tmp_path / "job", parts, heard)
    same(found, merged(Alone(), tmp_path / "job", shards(PARTS)))
    (said,) = left_out(heard)
    assert (tmp_path / "node").read_text(encoding="utf-8")[:8] in said and "disk is full" in said


def test_no_node_with_room_on_its_disk_is_one_message(tmp_path, nodes):
    """Simulated: every shard raises what the system would."""
    with pytest.raises(
        ShardError, match=r"No node .* can keep the files of noise\. node .*full.*; node .*full"
    ) as caught:
        merged(
            Cluster(nodes.address),
            tmp_path / "job",
            shards(PARTS, at0=Task(0, "full"), at1=Task(1, "full")),
            Heard(),
        )
    assert "TMPDIR" in caught.value.hint


@pytest.mark.slow
def test_a_killed_node_changes_nothing(tmp_path, nodes):
    """Last, since the cluster has one node less then."""
    told, heard = tmp_path / "pid", Heard()
    parts = shards(PARTS, at2=Task(2, "hang", told))

    def kill():
        while not (told.exists() and told.read_text(encoding="utf-8")):
            time.sleep(0.05)
        # The node's raylet has started the worker: without it the node is gone, as when its machine is.
        raylet = next(
            line
            for line in Path(f"/proc/{told.read_text(encoding='utf-8')}/status")
            .read_text(encoding="utf-8")
            .splitlines()
            if "PPid" in line
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
    from mpq_deploy.system.parallel.node import Packed, unpacked

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
