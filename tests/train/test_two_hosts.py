"""Two hosts on one machine: network namespaces with a cable between them, the multi-node accelerate files, one process on each.

Each host starts the same command by itself, as under SLURM; they share the run folder and nothing else but the cable.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import needs
import pytest
import yaml
from test_engines import one_process, rollouts
from tiny_recipe import (
    PROBE,
    TWO_PROCESSES,
    adapter,
    both_cores,
    command,
    environment,
    largest_difference,
    launcher,
    save_small,
    write_recipe,
)

from trimtab.cli.launch import resolve_accelerate_config

FIRST, SECOND = "10.77.0.1", "10.77.0.2"


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Names of two network namespaces, cabled: the first is 10.77.0.1, the second 10.77.0.2."""
    needs.iproute2()
    names = [f"trimtab-{os.getpid()}-{number}" for number in (1, 2)]
    cables = [f"tt{os.getpid()}a", f"tt{os.getpid()}b"]
    made = [ip("netns", "add", name).returncode for name in names]
    made.append(ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1]).returncode)
    try:
        if any(made):
            pytest.skip(
                "no network namespace can be made: run the tests in a container with CAP_NET_ADMIN and CAP_SYS_ADMIN"
            )
        for name, cable, address in zip(names, cables, (FIRST, SECOND), strict=True):
            for words in (
                ["link", "set", cable, "netns", name],
                ["-n", name, "link", "set", cable, "name", "cable"],
                ["-n", name, "addr", "add", f"{address}/24", "dev", "cable"],
                ["-n", name, "link", "set", "cable", "up"],
                ["-n", name, "link", "set", "lo", "up"],
            ):
                done = ip(*words)
                assert done.returncode == 0, done.stderr
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)
        ip("link", "del", cables[0])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("hosts") / "model")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("engine", "method", "kind"), [("ddp-multinode", "sft", "MULTI_CPU"), ("zero3-multinode", "sft", "DEEPSPEED")]
)
def test_two_hosts_train_the_adapter_of_one_process(
    hosts: list[str], model: Path, tmp_path: Path, engine: str, method: str, kind: str
) -> None:
    if engine.startswith("zero"):
        needs.deepspeed()
    alone = one_process(method, model)
    folder, notes = tmp_path / "run", tmp_path / "notes"
    notes.mkdir()
    recipe = write_recipe(tmp_path / "recipe.yaml", model, method, **TWO_PROCESSES)
    content = yaml.safe_load(resolve_accelerate_config(engine).read_text(encoding="utf-8"))
    config = tmp_path / "accelerate.yaml"
    config.write_text(yaml.safe_dump({**content, "use_cpu": True}), encoding="utf-8")
    variables = {
        "TRIMTAB_PROBE": str(notes), "TRIMTAB_ENGINE": engine, "TRIMTAB_METHOD": method, "GLOO_SOCKET_IFNAME": "cable",
    }  # fmt: skip
    with both_cores(), contextlib.ExitStack() as running:
        processes = []
        for rank, host in enumerate(hosts):
            start = ["ip", "netns", "exec", host, *launcher(config, sys.executable), "--num_processes", "2"]
            start += ["--machine_rank", str(rank), "--main_process_ip", FIRST]
            log = running.enter_context((tmp_path / f"host-{rank}.log").open("w"))
            process = subprocess.Popen(
                command(recipe, folder, script=PROBE, launcher=start),
                env=environment(**variables), cwd=tmp_path, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
            running.callback(process.kill)
            processes.append(process)
        for rank, process in enumerate(processes):
            assert process.wait(300) == 0, (tmp_path / f"host-{rank}.log").read_text(encoding="utf-8")[-5000:]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(notes.iterdir())]
    assert [(note["distributed_type"], note["processes"]) for note in found] == [(kind, 2)] * 2
    assert found[0]["zero_stage"] == (3 if engine.startswith("zero3") else None)
    for note in found:
        share = note["sharded"] / note["weights"]
        assert share > 0.95 if engine.startswith("zero3") else share == 0
    assert rollouts(folder) == rollouts(alone)
    assert largest_difference(adapter(folder), adapter(alone)) < 1e-4
