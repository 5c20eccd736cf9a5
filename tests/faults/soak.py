"""Captioning and training for a while on a local cluster to which something happens every two minutes.

    python tests/faults/soak.py --minutes 45

Rounds of captioning and of pretraining run beside each other, each on storage of its own on the S3 server. A round whose job
ends with an error is started again with the same command until it ends well; then its datasets are judged as the fault tests
judge them. The memory of all processes of cluster, server and jobs is sampled. Ends with 1 where rows were lost, or where the
memory of the processes that last grew; `--output` has all of it as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "distributed")]

from captioning_job import NUM_TILES, Job, write_tiles
from faulty_proxy import FaultyProxy
from nodes import QUICK, Nodes, several_nodes
from pretraining_run import EPOCHS, NUM_ROWS, Pretraining, pack
from s3_server import S3Server

from urbanclip_ray.storage import Dataset, delete_folder

BUCKET = "soak"
HERE = Path(__file__).parent
NUM_NODES, CPUS_PER_NODE = 3, 2
SAMPLE_EVERY_S = 10.0
LEAST_MINUTES = 3.0
MOST_STARTS = 20  # of one round, which then has failed
MIB = 1 << 20
MOST_GROWTH_MIB, MOST_GROWTH_SHARE = 64.0, 0.1  # between the second quarter of the time and the last one
LASTING = ("gcs_server", "raylet", "dashboard.py", "several_nodes.py", "radosgw", "ceph-osd", "ceph-mon", "soak.py")
ALL, ALL_LASTING = "all processes", "processes that last"


class Soak:
    """Everything that runs, and what has been noted of it."""

    def __init__(self, folder: Path, minutes: float, seed: int, fault_every_s: float) -> None:
        self.folder = folder
        self.end_s = time.monotonic() + 60 * minutes
        self.fault_every_s = fault_every_s
        self.random = random.Random(seed)
        self.rounds: list[dict[str, Any]] = []
        self.faults: list[dict[str, Any]] = []
        self.samples: list[dict[str, float]] = []
        self.failures: list[str] = []
        self.start_s = time.monotonic()

    def since_start_s(self) -> float:
        return round(time.monotonic() - self.start_s, 1)

    def is_over(self) -> bool:
        return time.monotonic() > self.end_s


def work(soak: Soak, kind: str, start_round: Callable[[Path, str], tuple[list[str], Callable[[], int]]]) -> None:
    """Rounds of one kind until the time is over; the last one is finished."""
    number = 0
    while not soak.is_over():
        folder, uri = soak.folder / f"{kind}-{number:04d}", f"s3://{BUCKET}/{kind}-{number:04d}"
        folder.mkdir()
        command, count_lost = start_round(folder, uri)
        begun_s, num_starts = time.monotonic(), 0
        code = None
        while code != 0 and num_starts < MOST_STARTS:
            num_starts += 1
            with (folder / "log").open("ab") as log:
                code = subprocess.run(command, stdout=log, stderr=log, env=os.environ | QUICK).returncode
        try:
            assert code == 0, (folder / "log").read_text()[-2000:]
            rows_lost = count_lost()
            delete_folder(uri)  # the server keeps its objects in memory
        except Exception as error:  # whatever it is: in a thread of its own it would end the rounds unseen
            rows_lost = None
            soak.failures.append(f"{uri}: {type(error).__name__}: {error}")
        seconds = round(time.monotonic() - begun_s, 1)
        soak.rounds.append({"kind": kind, "seconds": seconds, "starts": num_starts, "rows_lost": rows_lost})
        print(f"{soak.since_start_s():7.0f} s  {kind} round {number}: {num_starts} starts, {seconds} s", flush=True)
        number += 1


def captioning_round(address: str) -> Callable[[Path, str], tuple[list[str], Callable[[], int]]]:
    def start(folder: Path, uri: str) -> tuple[list[str], Callable[[], int]]:
        job = Job(f"s3://{BUCKET}/tiles", uri, folder, address)
        return job.command(), job.rows_lost_of_the_end

    return start


def pretraining_round(shards: Dataset) -> Callable[[Path, str], tuple[list[str], Callable[[], int]]]:
    def start(folder: Path, uri: str) -> tuple[list[str], Callable[[], int]]:
        command = [sys.executable, str(HERE / "pretraining_run.py"), shards.uri, str(folder), uri]
        return command, Pretraining(shards, folder, uri).rows_lost

    return start


def kill_one(titles: Sequence[str], soak: Soak) -> bool:
    """SIGKILL one of the processes below this one whose command line has such a word; whether there was one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue  # it ended while it was looked at
        if any(title in line for title in titles):
            found.append(process)
    if not found:
        return False
    try:
        soak.random.choice(found).kill()
    except psutil.NoSuchProcess:
        return False
    return True


def lose_a_node(nodes: Nodes) -> bool:
    nodes.remove()
    nodes.add()
    return True


def stop_the_server(server: S3Server) -> bool:
    server.kill_gateway()
    time.sleep(10)
    server.start_gateway()
    return True


def be_slow(proxy: FaultyProxy) -> bool:
    proxy.delay_s = 0.2
    time.sleep(20)
    proxy.answer_again()
    return True


def refuse(proxy: FaultyProxy) -> bool:
    proxy.refuse_for(10)
    return True


def reset_uploads(proxy: FaultyProxy) -> bool:
    proxy.num_resets_left = 6
    return True


def make_faults(soak: Soak, nodes: Nodes, server: S3Server, proxy: FaultyProxy) -> None:
    """One every `fault_every_s`, of a kind that is drawn; every kind comes before one comes again."""
    kinds: dict[str, Callable[[], bool]] = {
        "training worker SIGKILL": lambda: kill_one(["ray::RayTrainWorker"], soak),
        "captioning actor SIGKILL": lambda: kill_one(["ray::MapWorker", "CountedBatch"], soak),
        "captioning driver SIGKILL": lambda: kill_one(["counted_captions.py"], soak),
        "training driver SIGKILL": lambda: kill_one(["pretraining_run.py"], soak),
        "node lost and another one": lambda: lose_a_node(nodes),
        "S3 down 10 s": lambda: stop_the_server(server),
        "503 SlowDown for 10 s": lambda: refuse(proxy),
        "slow S3 (200 ms) for 20 s": lambda: be_slow(proxy),
        "connection reset in 6 uploads": lambda: reset_uploads(proxy),
    }
    waiting: list[str] = []
    while not soak.is_over():
        time.sleep(soak.fault_every_s)
        if not waiting:
            waiting = soak.random.sample(sorted(kinds), len(kinds))
        name = waiting.pop()
        while not soak.is_over():
            at_s = soak.since_start_s()
            if kinds[name]():
                soak.faults.append({"at_s": at_s, "fault": name})
                print(f"{at_s:7.0f} s  {name}", flush=True)
                break
            time.sleep(1)  # between two rounds there is no such process


def measure(soak: Soak, server: S3Server) -> None:
    """Memory in MiB of all processes, what they share counted once (PSS), and of those that last what is theirs alone (USS).

    How many others share the libraries of a process changes all the time, so PSS says nothing of its growth.
    """
    while not soak.is_over():
        total, lasting = 0, dict.fromkeys(LASTING, 0)
        for process in [psutil.Process(), *psutil.Process().children(recursive=True), *server_processes(server)]:
            try:
                memory, command = process.memory_full_info(), process.cmdline()
            except psutil.Error:  # it has just ended
                continue
            total += memory.pss
            for name in lasting.keys() & {Path(part).name for part in command[:4]}:
                lasting[name] += memory.uss
        found = {ALL: total, ALL_LASTING: sum(lasting.values())} | lasting
        soak.samples.append({"at_s": soak.since_start_s()} | {name: count / MIB for name, count in found.items()})
        time.sleep(SAMPLE_EVERY_S)


def server_processes(server: S3Server) -> list[psutil.Process]:
    found = []
    for file in server.folder.glob("*.pid"):
        try:
            found.append(psutil.Process(int(file.read_text())))
        except (ValueError, psutil.Error):  # it is being started again
            continue
    return found


def growth(samples: Sequence[dict[str, float]], name: str) -> dict[str, float]:
    """Medians of the second and of the last quarter, and the slope of a straight line through all but the first quarter."""
    quarter = max(1, len(samples) // 4)
    early, late = ([sample[name] for sample in part] for part in (samples[quarter : 2 * quarter], samples[-quarter:]))
    rest = samples[quarter:]
    slope = statistics.linear_regression([sample["at_s"] for sample in rest], [sample[name] for sample in rest]).slope
    return {
        "early_mib": round(statistics.median(early), 1),
        "late_mib": round(statistics.median(late), 1),
        "slope_mib_per_hour": round(3600 * slope, 1),
    }


def is_flat(found: dict[str, float]) -> bool:
    return found["late_mib"] - found["early_mib"] <= MOST_GROWTH_MIB + MOST_GROWTH_SHARE * found["early_mib"]


def run(soak: Soak) -> None:
    server = S3Server(soak.folder / "server")
    server.start()
    proxy = FaultyProxy(server.port)
    try:
        keys = server.add_user("soak")
        server.client(keys).create_bucket(Bucket=BUCKET)
        os.environ |= server.environment(keys) | {"AWS_ENDPOINT_URL": proxy.endpoint}
        write_tiles(f"s3://{BUCKET}/tiles")
        with several_nodes(NUM_NODES, "--cpus", str(CPUS_PER_NODE)) as nodes:
            os.environ |= QUICK | {"RAY_ADDRESS": nodes.address}
            shards = pack_once(soak.folder / "packed")
            soak.start_s = time.monotonic()
            threads = [
                threading.Thread(target=work, args=(soak, "captioning", captioning_round(nodes.address))),
                threading.Thread(target=work, args=(soak, "pretraining", pretraining_round(shards))),
                threading.Thread(target=make_faults, args=(soak, nodes, server, proxy), daemon=True),
                threading.Thread(target=measure, args=(soak, server), daemon=True),
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        proxy.stop()
        server.stop()


def pack_once(folder: Path) -> Dataset:
    import ray

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    shards = pack(folder)
    ray.shutdown()
    return shards


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--fault-every-s", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/soak.json"))
    arguments = parser.parse_args()
    if arguments.minutes < LEAST_MINUTES:
        parser.error(f"--minutes must be at least {LEAST_MINUTES:g}: memory is compared between quarters of the time")
    with tempfile.TemporaryDirectory(prefix="urbanclip_ray_soak_") as folder:
        soak = Soak(Path(folder), arguments.minutes, arguments.seed, arguments.fault_every_s)
        run(soak)
    memory = {name: growth(soak.samples, name) for name in (ALL, ALL_LASTING, *LASTING)}
    report = {
        "minutes": arguments.minutes,
        "seed": arguments.seed,
        "rounds": soak.rounds,
        "rows": {"captioning": NUM_TILES, "pretraining": NUM_ROWS * EPOCHS},
        "faults": soak.faults,
        "failures": soak.failures,
        "memory": memory,
        "samples": soak.samples,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1))
    print_tables(soak, memory)
    return 0 if not soak.failures and is_flat(memory[ALL_LASTING]) else 1


def print_tables(soak: Soak, memory: dict[str, dict[str, float]]) -> None:
    print("\n| work | rounds | starts | rows lost |\n|---|---|---|---|")
    for kind in ("captioning", "pretraining"):
        done = [found for found in soak.rounds if found["kind"] == kind]
        lost = sum(found["rows_lost"] or 0 for found in done)  # rounds that cannot be judged are failures, named below
        print(f"| {kind} | {len(done)} | {sum(found['starts'] for found in done)} | {lost} |")
    print("\n| memory of | second quarter, MiB | last quarter, MiB | slope, MiB an hour |\n|---|---|---|---|")
    for name, found in memory.items():
        print(f"| {name} | {found['early_mib']} | {found['late_mib']} | {found['slope_mib_per_hour']} |")
    print(f"\n{len(soak.faults)} faults; {'; '.join(soak.failures) or 'nothing lost'}")


if __name__ == "__main__":
    sys.exit(main())
