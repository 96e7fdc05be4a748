"""The configurations for accelerate and the script for SLURM start what docs/distributed.md says they do."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from models import tiny_config

from hf_maskformer.data.generated_scenes import write_generated_scenes

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "scripts/configs/accelerate"
MODULE = ["-m", "hf_maskformer", "train"]
SCRIPT = [str(ROOT / "scripts/train.py")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("launching")
    write_generated_scenes(root / "data", num_train=4, num_val=3, image_size=(64, 64))
    tiny_config().save_pretrained(root / "config")
    return root


def options_of(inputs, output):
    options = {"config": inputs / "config", "data": inputs / "data", "output_dir": output, "image_size": 64}
    options |= {"max_steps": 2, "save_steps": 1, "report_to": "none", "use_cpu": "true", "check_data": "false"}
    return [f"--{name}={value}" for name, value in options.items()]


def environment(**variables):
    # A process each, on the two cores that a small machine has.
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


def launch(config, *options):
    return [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={CONFIGS / config}.yaml", *options]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_trained(output, num_processes):
    states = {path.name for path in (output / "checkpoint-2").glob("rng_state*")}
    assert states == {f"rng_state_{rank}.pth" for rank in range(num_processes)}
    assert (output / "eval_results.json").is_file()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration_and_knows_each_of_its_lines(path):
    config = load_config_from_file(str(path))
    for line in path.read_text().splitlines():
        name, separator, value = re.sub("#.*", "", line).partition(":")
        if separator and not line.startswith(" ") and value.strip():
            expected = value.strip().strip('"')
            found = getattr(config, name)
            assert str(getattr(found, "value", found)).lower() == expected.lower()


@pytest.mark.slow
@pytest.mark.parametrize("command", [MODULE, SCRIPT], ids=["module", "script"])
@pytest.mark.parametrize("config", ["ddp", "bf16", "fsdp2"])
def test_a_configuration_trains(inputs, tmp_path, config, command):
    options = ["--num_processes=2", f"--main_process_port={free_port()}"]
    process = [*launch(config, *options), *command, *options_of(inputs, tmp_path / "run")]
    done = subprocess.run(process, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_trained(tmp_path / "run", 2)


@pytest.mark.slow
def test_two_machines_train_together(inputs, tmp_path):
    """Two launchers on one machine, which meet at its address."""
    options = ["--num_processes=2", "--main_process_ip=127.0.0.1", f"--main_process_port={free_port()}"]
    errors = [tmp_path / f"errors{rank}" for rank in range(2)]  # files: nobody empties a pipe while waiting for another
    machines = [
        subprocess.Popen(
            [*launch("multi_node", *options, f"--machine_rank={rank}"), *MODULE, *options_of(inputs, tmp_path / "run")],
            env=environment(),
            stderr=path.open("w"),
        )
        for rank, path in enumerate(errors)
    ]
    try:
        for machine, path in zip(machines, errors, strict=True):
            assert machine.wait(timeout=300) == 0, path.read_text()[-3000:]
    finally:
        for machine in machines:
            machine.kill()
    assert_trained(tmp_path / "run", 2)


def slurm_script():
    """That of the docs."""
    text = (ROOT / "docs/distributed.md").read_text()
    (script,) = re.findall(r"^    (#!/bin/bash\n(?:    .*\n)+)", text, re.MULTILINE)
    return re.sub("^    ", "", script, flags=re.MULTILINE)


def stand_in(path, lines):
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    path.chmod(0o755)


@pytest.mark.slow
@pytest.mark.parametrize("is_complete", [True, False])
def test_the_script_for_slurm_trains_on_two_nodes_and_queues_again_until_it_is_complete(inputs, tmp_path, is_complete):
    """With stand-ins for what SLURM brings along: `srun` starts its command once for each of two nodes."""
    output, tools = tmp_path / "run", tmp_path / "tools"
    tools.mkdir()
    stand_in(
        tools / "scontrol",
        [
            'if [ "$1 $2 $3" = "show hostnames node[1-2]" ]; then printf "127.0.0.1\\nnode2\\n"',
            f'elif [ "$1 $2" = "requeue 7" ]; then touch {tmp_path}/queued; else exit 1; fi',
        ],
    )
    stand_in(
        tools / "srun",
        ['SLURM_NODEID=1 "$@" &', 'SLURM_NODEID=0 "$@"', "code=$?", "wait $! && exit $code"]
        if is_complete
        else ["exit 1"],  # as when time is up
    )
    stand_in(tools / "accelerate", [f'shift; exec {sys.executable} -m accelerate.commands.launch "$@"'])
    script = slurm_script()
    assert "#SBATCH --nodes=2 --ntasks-per-node=1" in script
    options = " ".join(option for option in options_of(inputs, output) if not option.startswith("--output_dir"))
    places = {"scripts/train.py ...": f"{SCRIPT[0]} {options}", "OUTPUT": str(output)}
    places |= {"--main_process_ip": f"--num_processes 2 --main_process_port {free_port()} --main_process_ip"}
    for name, value in places.items():
        assert name in script
        script = script.replace(name, value)
    variables = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "7", "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], env=environment(**variables), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (tmp_path / "queued").exists() != is_complete, done.stderr[-3000:]
    if is_complete:
        assert_trained(output, 2)
