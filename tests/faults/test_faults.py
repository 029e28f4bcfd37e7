"""Whatever happens to a scan, the next start makes of it what an undisturbed one would be."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

import unbraid

SCANNING = Path(__file__).with_name("scanning.py")
N_FILES = 2 * (2 + 5)  # layer, manifest and shards of two layers
# With a meeting point of its own, as other tests may be running on the machine.
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def start(folder, n_ranks=1, moment="", more=()):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    many = () if n_ranks == 1 else (*TORCHRUN, *more, "--nproc-per-node", str(n_ranks))
    command = [sys.executable, *many, str(SCANNING), str(folder), *([moment] if moment else [])]
    return subprocess.Popen(command, **pipes)


def finish(folder, n_ranks=1):
    done = start(folder, n_ranks)
    output, _ = done.communicate(timeout=300)
    assert done.returncode == 0, output


def ready(process, n_ranks=1):
    """Wait until all ranks begin; their process ids."""
    assert process.stdout is not None
    begun = {}
    for line in process.stdout:
        if line.startswith("ready"):
            rank, pid = map(int, line.split()[1:])
            begun[rank] = pid
        if len(begun) == n_ranks:
            return begun
    raise AssertionError("it did not begin")


def is_finished(folder):
    """Whether all files of a scan have their names."""
    there = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".tmp"]
    return len(there) == N_FILES


def assert_same(folder, undisturbed):
    """The same files, byte for byte, and nothing else."""
    ours, theirs = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (folder, undisturbed)
    )
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def kill_at_random(folder, n_ranks, seed, seconds):
    """Kill one of the ranks while the scan is on; where it ended before, try again and sooner."""
    draw = random.Random(seed)
    victim, latest = draw.randrange(n_ranks), seconds / n_ranks
    while True:
        process = start(folder, n_ranks)
        pids = ready(process, n_ranks)
        time.sleep(draw.uniform(0, latest))
        with suppress(ProcessLookupError):
            os.kill(pids[victim], signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
        died = process.returncode == -signal.SIGKILL if n_ranks == 1 else "(SIGKILL)" in output
        if died and not is_finished(folder):
            return
        assert died or process.returncode == 0, output
        shutil.rmtree(folder, ignore_errors=True)
        latest /= 2


def test_a_changed_byte_and_a_missing_file_are_told(undisturbed, tmp_path):
    copy = Path(shutil.copytree(undisturbed, tmp_path / "copy"))
    assert_same(copy, undisturbed)
    shard = copy / "1" / "shard-000002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(AssertionError):
        assert_same(copy, undisturbed)
    shard.rename(f"{shard}.1.tmp")
    assert not is_finished(copy)
    with pytest.raises(AssertionError):
        assert_same(copy, undisturbed)


SEEDS = [*range(5), *(pytest.param(n, marks=pytest.mark.slow) for n in range(5, 110))]


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_at_random_it_goes_on(seed, timed, tmp_path):
    folder, (undisturbed, seconds) = tmp_path / "scan", timed
    kill_at_random(folder, 1 + seed % 3, seed, seconds)
    finish(folder, 1 + (seed // 3) % 3)
    assert_same(folder, undisturbed)


@pytest.mark.parametrize("moment", ["rename 1", "named 3", "rename 7", "named 9"])
def test_killed_around_a_rename_it_goes_on(moment, undisturbed, tmp_path):
    killed = start(tmp_path, moment=moment)
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    n_named = int(moment.split()[1]) - moment.startswith("rename")
    kept = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".tmp"]
    assert len(kept) == n_named
    finish(tmp_path)
    assert_same(tmp_path, undisturbed)


@pytest.mark.parametrize("n_ranks", [2, 3, pytest.param(8, marks=pytest.mark.slow)])
def test_many_processes_leave_the_same_bytes(n_ranks, undisturbed, tmp_path):
    finish(tmp_path, n_ranks)
    assert_same(tmp_path, undisturbed)


def test_deviations_within_images_are_the_same_whoever_scans(tmp_path, monkeypatch):
    monkeypatch.setenv("POOLED", "1")
    alone, together, killed = (tmp_path / name for name in ("alone", "together", "killed"))
    finish(alone)
    finish(together, 2)
    start(killed, moment="named 7").communicate(timeout=300)
    assert not is_finished(killed)
    finish(killed)
    for other in (together, killed):
        assert_same(other, alone)
    for layer, n_taps in {"1": 27, "3": 6}.items():
        spread = unbraid.open_scan(alone / layer).spread(0)
        assert spread.shape == (50 * 36, n_taps)
        assert spread.any(1).all()


@pytest.mark.parametrize("target", ["segmentation:0", "none", "multilabel"])
def test_another_target_is_the_same_whoever_scans_and_whatever_happens(
    target, tmp_path, monkeypatch
):
    monkeypatch.setenv("TARGET", target)
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    finish(alone)
    start(killed, moment="named 7").communicate(timeout=300)
    assert not is_finished(killed)
    finish(killed, 2)
    assert_same(killed, alone)
    for layer in ("1", "3"):
        scan = unbraid.open_scan(alone / layer)
        assert scan.manifest.target == target
        assert any(len(own.share_channel) for own in scan.shards()) == (target != "none")


# A part without its shard, parts put together by half, and all but the last file.
MOMENTS = ["named 5", "named 25", "rename 30"]


def test_places_are_the_same_whoever_scans_and_whatever_happens(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACES", "4")
    alone = tmp_path / "alone"
    finish(alone)
    both = [start(tmp_path / "twice") for _ in range(2)]
    finish(tmp_path / "together", 3)
    killed = [(start(tmp_path / moment, moment=moment), tmp_path / moment) for moment in MOMENTS]
    for process in both:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    for process, folder in killed:
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL
        assert not (folder / "3/places/manifest.json").exists()
        finish(folder, 1 + len(folder.name) % 2)
    for folder in (tmp_path / "twice", tmp_path / "together", *(own for _, own in killed)):
        assert_same(folder, alone)
    for layer in ("1", "3"):
        assert unbraid.open_scan(alone / layer / "places").layer.name == layer


def test_two_equal_starts_at_once_leave_the_same_bytes(undisturbed, tmp_path):
    both = [start(tmp_path / "scan"), start(tmp_path / "scan")]
    for process in both:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    assert_same(tmp_path / "scan", undisturbed)


def test_a_rank_that_dies_loses_no_finished_shard(undisturbed, tmp_path):
    killed = start(tmp_path, 2, moment="named 7")  # rank 0, with a shard of its own named
    output, _ = killed.communicate(timeout=300)
    assert killed.returncode != 0, output
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("shard-*.safetensors")}
    assert kept
    finish(tmp_path)  # with another number of ranks
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert_same(tmp_path, undisturbed)


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_command_line_with_a_line_that_says_how_to_go_on(sign, code, tmp_path):
    folder = tmp_path / "data" / "a"
    folder.mkdir(parents=True)
    for n in range(400):
        Image.new("RGB", (8, 8), (n % 256, 0, 0)).save(folder / f"{n}.png")
    (tmp_path / "slow.py").write_text(
        "import sys, torchvision\n"
        f"sys.path.insert(0, {str(SCANNING.parent)!r})\n"
        "from scanning import network\n"
        "def build():\n"
        "    return network(), torchvision.transforms.ToTensor()\n"
    )
    arguments = ["scan", "--model", "slow.py:build", "--layer", "3", "--data", "data"]
    process = subprocess.Popen(
        [sys.executable, "-m", "unbraid", *arguments, "--out", "out", "--batch-size", "1"],
        **{"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    while not (tmp_path / "out" / "manifest.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(sign)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "start the same command again and it goes on" in err
    assert "Traceback" not in err
    assert not list((tmp_path / "out").glob("*.tmp"))


def mount_small_disk(folder, kilobytes):
    """Say also whether that is allowed."""
    folder.mkdir()
    if shutil.which("mount") is None:
        return False
    options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    return subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_full_disk_loses_nothing(n_ranks, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    size = sum(p.stat().st_size for p in undisturbed.rglob("*"))
    if not mount_small_disk(disk, size // 2 // 1024):
        pytest.skip("a small disk cannot be mounted here")
    try:
        stopped = start(disk / "scan", n_ranks)
        output, _ = stopped.communicate(timeout=300)
        assert stopped.returncode != 0
        assert "The disk is full" in output
        assert n_ranks > 1 or not list(disk.rglob("*.tmp"))  # the other rank is ended anywhere
        kept = shutil.copytree(disk / "scan", tmp_path / "scan")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert list(kept.rglob("shard-*.safetensors"))
    finish(kept)
    assert_same(kept, undisturbed)
