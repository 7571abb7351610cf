"""The launchers: who restarts, who gives up, who is told; with stand-ins for what they call, and once for real."""

import copy
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

from jobset_schema import JOBSET
from medseg_jax.runtime.checkpoint import Checkpoints, verify_manifest
from runs import STEPS, last, losses, write_config

LAUNCH = Path(__file__).parents[2] / "launch"


# ---------------------------------------------------------------- local.py


@pytest.fixture
def local(monkeypatch):
    spec = importlib.util.spec_from_file_location("launch_local", LAUNCH / "local.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(module, "GRACE", 0.5)

    def launch(code: str, *args: str) -> int:
        """Runs `code`, which knows its process `me`, in the place of medseg train."""
        script = f"import os, signal, sys, time\nme = os.environ['PROCESS_ID']\n{code}"
        monkeypatch.setattr(module, "COMMAND", [sys.executable, "-c", script])
        return module.main([*args, "a config"])

    yield launch
    for number, handler in before.items():
        signal.signal(number, handler)


def test_local_tells_each_process_who_it_is_and_what_to_do(local, capfd):
    code = "print(me, os.environ['NUM_PROCESSES'], os.environ['COORDINATOR_ADDRESS'], sys.argv[1:])"
    assert local(code, "3") == 0
    lines = sorted(capfd.readouterr().out.splitlines())
    address = lines[0].split()[3]
    assert address.startswith("localhost:")
    assert lines == [f"[{i}] {i} 3 {address} ['a config']" for i in range(3)]


def test_local_starts_all_again_when_one_is_killed_and_kills_who_hangs(local, capfd, tmp_path):
    """The first start: 1 is killed, 2 ends by itself, 0 hangs. The second one goes through."""
    code = f"""
first = not os.path.exists({str(tmp_path / "second")!r})
time.sleep(0.2)
if first and me == '1':
    open({str(tmp_path / "second")!r}, 'w').close()
    os.kill(os.getpid(), signal.SIGKILL)
if first and me == '2':
    time.sleep(0.3)
    sys.exit(75)
if first:
    time.sleep(60)
"""
    assert local(code, "--restarts", "1", "3") == 0
    said = capfd.readouterr().out
    assert "process 1 was killed by SIGKILL" in said
    assert "process 0 hangs: killed" in said
    assert "process 2 hangs" not in said
    assert "start 2 of 2" in said


@pytest.mark.parametrize("code", [1, 2])
def test_local_does_not_start_again_what_is_explained(local, capfd, code):
    assert local(f"sys.exit({code})", "--restarts", "5", "1") == code
    said = capfd.readouterr().out
    assert f"process 0 ended with exit code {code}" in said
    assert "start 2" not in said


def test_local_gives_up_after_its_restarts(local, capfd):
    assert local("sys.exit(75)", "--restarts", "2", "1") == 75
    assert capfd.readouterr().out.count("[launcher] start ") == 2


def test_local_hands_a_signal_on_to_all(local, capfd, tmp_path):
    code = f"""
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
open({str(tmp_path)!r} + '/' + me, 'w').close()
time.sleep(60)
"""

    def ask():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    assert local(code, "--restarts", "5", "2") == 143
    assert "start 2" not in capfd.readouterr().out


def test_local_goes_on_after_words_that_are_no_text(local, capfd):
    """A dump in C++, say."""
    code = r"sys.stdout.buffer.write(b'caf\xe9\n'); sys.stdout.flush(); time.sleep(0.3); print('trained')"
    assert local(code, "--restarts", "0", "1") == 0
    assert capfd.readouterr().out.splitlines() == ["[0] caf\ufffd", "[0] trained"]


def test_local_without_work_says_how(local):
    with pytest.raises(SystemExit):
        local("", "0")


@pytest.mark.slow
def test_local_restarts_a_real_run_that_loses_a_process(phantoms, tmp_path):
    config = write_config(tmp_path / "config.py", phantoms.root)
    out = tmp_path / "run"
    command = [sys.executable, str(LAUNCH / "local.py"), "2", str(config), "--out", str(out), "--no-report"]
    launcher = subprocess.Popen([*command, "--checkpoint_every", "1"], stdout=subprocess.PIPE, text=True)
    while not Checkpoints(last(out), read_only=True).steps():
        assert launcher.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(random.Random(0).choice(children)), signal.SIGKILL)
    said, _ = launcher.communicate(timeout=400)
    assert launcher.returncode == 0, said
    assert "was killed by SIGKILL" in said
    assert "resuming from step" in said
    assert len(losses(out)) == STEPS
    assert not verify_manifest(last(out) / str(STEPS))


# ---------------------------------------------------------------- shell scripts


@pytest.fixture
def shell(tmp_path):
    """Runs a script of launch/ with stand-ins for the programs that it calls; returns (exit code, said, calls)."""

    def run(script: str, *args: str, programs: dict[str, str], **environment: str) -> tuple[int, str, list[str]]:
        folder = tmp_path / "programs"
        folder.mkdir(exist_ok=True)
        calls = tmp_path / "calls"
        for name, body in programs.items():
            program = folder / name
            program.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {calls}\n{body}\n')
            program.chmod(0o755)
        env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HERE": str(tmp_path), **environment}
        command = ["bash", str(LAUNCH / script), *args]
        done = subprocess.run(
            command,
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            start_new_session=True,
        )
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines() if calls.exists() else []

    return run


@pytest.mark.parametrize("script", ["slurm.sh", "tpu_vm.sh"])
def test_a_script_is_bash_and_says_how_it_is_used(shell, script):
    assert subprocess.run(["bash", "-n", str(LAUNCH / script)], check=False).returncode == 0
    assert os.access(LAUNCH / script, os.X_OK)
    code, said, calls = shell(script, programs={"gcloud": "", "srun": ""})
    assert code == 2
    assert "--out" in said
    assert not calls


# srun: one task for each word of `codes`; ends with the highest exit code, in which a death by signal N counts 128 + N.
# A number is how medseg ends there, `kill`: the task is killed, `term`: its shell hears SIGTERM before medseg fails.
SRUN = """
highest=0
for word in $(cat "$HERE/codes"); do
    (WORD=$word exec "${@:2}") || { code=$?; [ $code -le $highest ] || highest=$code; }
done
exit $highest
"""
TASK = """
case $WORD in
    kill) kill -KILL $PPID ;;
    term) kill -TERM $PPID; sleep 0.2; exit 2 ;;
    *) exit $WORD ;;
esac
"""
SCONTROL = """[ "$1" = requeue ] || echo "JobId=7 JobName=medseg
   JobState=${STATE:-RUNNING Reason=None} Dependency=(null)" """


def slurm(shell, home: Path, codes: str, **environment):
    (home / "codes").write_text(codes)
    programs = {"srun": SRUN, "medseg": TASK, "scontrol": SCONTROL}
    words = ("a config", "--out", "my run")
    code, said, calls = shell("slurm.sh", *words, programs=programs, SLURM_JOB_ID="7", **environment)
    assert not list(home.glob("*.explained"))
    return code, said, calls


@pytest.mark.parametrize(
    ("codes", "ended", "again"),
    [
        ("0 0", 0, False),
        ("1", 1, False),
        ("2 2", 2, False),
        ("75 1 kill", 1, False),  # srun itself ends with 137
        ("kill 2", 2, False),
        ("75 75", 75, True),
        ("75 kill 134", 137, True),
        ("143 143", 143, True),
        ("term term", 2, False),
    ],
)
def test_slurm_queues_again_what_another_start_can_finish(shell, tmp_path, codes, ended, again):
    code, said, calls = slurm(shell, tmp_path, codes)
    assert code == ended, said
    assert calls[0].startswith("srun --kill-on-bad-exit=1 ")
    assert calls.count("medseg train a config --out my run") == len(codes.split())
    assert ("scontrol requeue 7" in calls) == again


def test_slurm_forgets_what_an_earlier_start_explained(shell, tmp_path):
    (tmp_path / "medseg-7.explained").write_text("2\n")
    assert slurm(shell, tmp_path, "75")[2][-1] == "scontrol requeue 7"


def test_slurm_queues_again_when_srun_itself_fails(shell, tmp_path):
    """Then nobody has explained anything, though the code is 1: a node is gone before the tasks have started."""
    programs = {"srun": "exit 1", "scontrol": SCONTROL}
    code, _, calls = shell("slurm.sh", "a", "--out", "b", programs=programs, SLURM_JOB_ID="7")
    assert code == 1
    assert calls[-1] == "scontrol requeue 7"


def test_slurm_does_not_queue_again_where_there_is_no_medseg(shell, tmp_path):
    code, said, calls = slurm(shell, tmp_path, "0 0", MEDSEG="no such-program")
    assert code == 127
    assert "not queued again" in said
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("state", "again"),
    [
        ("RUNNING Reason=None", True),
        ("CANCELLED Reason=None", False),
        ("COMPLETING Reason=None", False),  # how a cancelled job is shown while its processes still run
        ("COMPLETING Reason=TimeLimit", True),
    ],
)
def test_slurm_does_not_queue_again_what_scancel_ends(shell, tmp_path, state, again):
    code, said, calls = slurm(shell, tmp_path, "143 143", STATE=state)
    assert code == 143
    assert ("cancelled" in said) != again
    assert ("scontrol requeue 7" in calls) == again


def test_slurm_gives_up_after_its_restarts(shell, tmp_path):
    ended, said, calls = slurm(shell, tmp_path, "75", SLURM_RESTART_COUNT="3", RESTARTS="3")
    assert ended == 75
    assert "not queued again" in said
    assert "scontrol requeue 7" not in calls


def test_slurm_waits_for_the_run_when_the_shell_is_told_as_well(shell):
    """SIGTERM to the batch shell while medseg is saving: it is requeued with the run's own exit code."""
    programs = {"srun": "kill -TERM $PPID; sleep 0.3; exit 143", "scontrol": SCONTROL}
    ended, said, calls = shell("slurm.sh", "a", "--out", "b", programs=programs, SLURM_JOB_ID="7")
    assert ended == 143
    assert "has saved" in said
    assert calls[-1] == "scontrol requeue 7"


@pytest.mark.parametrize("cpus", ["", "16"])
def test_slurm_tells_srun_how_many_cpus_a_task_has(shell, cpus):
    programs = {"srun": 'echo "cpus: ${SRUN_CPUS_PER_TASK-none}"'}
    _, said, _ = shell("slurm.sh", "a", programs=programs, SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK=cpus)
    assert f"cpus: {cpus or 'none'}\n" in said


def test_slurm_asks_for_its_signal_in_time():
    text = (LAUNCH / "slurm.sh").read_text()
    assert "#SBATCH --signal=TERM@120" in text  # without B: the steps hear it, not the shell
    assert "#SBATCH --requeue" in text


# A cloud: `state` holds the slice's state, `codes` the exit codes of medseg, one a start; workers are this machine.
GCLOUD = """
case "$*" in
    *"queued-resources describe"*) cat "$HERE/state" 2> /dev/null || exit 1 ;;
    *"queued-resources create"*)
        echo "${FIRST:-ACTIVE}" > "$HERE/state"
        [ ! -e "$HERE/created" ] || echo ACTIVE > "$HERE/state"
        touch "$HERE/created" ;;
    *"queued-resources delete"*) rm -f "$HERE/state" ;;
    *"tpu-vm ssh"*)
        for word in "$@"; do case $word in --command=*) work=${word#--command=} ;; esac; done
        WORK=$work exec ssh ;; # by another name, so that pkill sees the words of WORK on the worker only
    *"tpu-vm scp"*) cp "$5" "$HERE/" 2> /dev/null || cp "$4" "$HERE/" ;;
esac
"""
# A shell that dies is a broken connection (255), after which gcloud calls once more if the worker is there.
SSH = f"""cd "$HERE" && exec {sys.executable} -S -c '
import os, subprocess, sys
for attempt in 1, 2:
    code = subprocess.call(["bash", "-c", os.environ["WORK"]])
    if 0 <= code < 255 or open("state").read() != "ACTIVE\\n":
        break
sys.exit(code if code >= 0 else 255)'
"""
CURL = """
case $* in
    *agent-worker-number*) echo 1 ;;
    *worker-network-endpoints*) cat "$HERE/endpoints" ;;
esac
"""
MEDSEG = """#!/usr/bin/env bash
echo "${COORDINATOR_ADDRESS-} ${NUM_PROCESSES-} ${PROCESS_ID-} $*" >> "$HERE/started"
code=$(head -n 1 "$HERE/codes") && sed -i 1d "$HERE/codes"
[ "$code" != lost ] || { echo SUSPENDED > "$HERE/state"; exit 255; }
[ "$code" != cut ] || { touch .stop; exit 255; }
exit "$code"
"""


def tpu(
    shell, home: Path, codes: str, endpoints="10.0.0.1,10.0.0.2", script="tpu_vm.sh", program=MEDSEG, **environment
):
    (home / "codes").write_text("\n".join(codes.split()) + "\n")
    (home / "endpoints").write_text(endpoints)
    medseg = home / "medseg_jax" / ".venv" / "bin" / "medseg"
    medseg.parent.mkdir(parents=True, exist_ok=True)
    medseg.write_text(program)
    medseg.chmod(0o755)
    programs = {
        "gcloud": GCLOUD,
        "ssh": SSH,
        "curl": CURL,
        "git": 'case $1 in rev-parse) echo abc ;; *) touch "${3#*=}" ;; esac',
    }
    programs |= dict.fromkeys(("mountpoint", "tar", "python3"), "exit 0")
    programs["pkill"] = f'exec {shutil.which("pkill")} --session 0 "$@"'  # the real one, among the test's own processes
    names = {"NAME": "mine", "ZONE": "here", "TYPE": "v5litepod-16", "SHARE": "nfs:/runs", "POLL": "0"}
    words = ("train", "a config", "--out", "share/my run")
    code, said, calls = shell(script, *words, programs=programs, **{**names, **environment})
    started = home / "started"
    return code, said, calls, started.read_text().splitlines() if started.exists() else []


def test_tpu_creates_installs_and_trains(shell, tmp_path):
    code, said, calls, started = tpu(shell, tmp_path, "0")
    assert code == 0, said
    assert started == ["10.0.0.1:8476 2 1 train a config --out share/my run"]
    created = next(call for call in calls if "queued-resources create" in call)
    assert "--accelerator-type=v5litepod-16" in created
    assert "--runtime-version=v2-alpha-tpuv5-lite" in created
    assert "--spot" not in created
    assert any(call.startswith("python3 -m uv venv") for call in calls)


def test_tpu_installs_a_commit_again_after_another_one(shell, tmp_path):
    """And leaves no archive on this machine."""
    (tmp_path / "medseg_jax").mkdir()
    (tmp_path / "medseg_jax" / ".installed-another").touch()
    (tmp_path / "archives").mkdir()
    code, said, _, _ = tpu(shell, tmp_path, "0", TMPDIR=str(tmp_path / "archives"))
    assert code == 0, said
    assert [path.name for path in (tmp_path / "medseg_jax").glob(".installed-*")] == [".installed-abc"]
    assert not list((tmp_path / "archives").iterdir())


def test_tpu_of_one_host_joins_nobody_and_old_endpoints_are_understood(shell, tmp_path):
    (tmp_path / "a").mkdir()
    assert tpu(shell, tmp_path / "a", "0", "10.0.0.1", HERE=str(tmp_path / "a"))[3][0].startswith("   train")
    (tmp_path / "b").mkdir()
    _, _, _, started = tpu(shell, tmp_path / "b", "0", "w0:1:10.0.0.7,w1:2:10.0.0.8", HERE=str(tmp_path / "b"))
    assert started[0].startswith("10.0.0.7:8476 2 1 train")


def test_tpu_starts_again_on_a_new_slice_when_the_old_one_is_taken_away(shell, tmp_path):
    """A peer lost, the slice lost, SIGTERM that nobody asked for; then the end."""
    code, said, calls, started = tpu(shell, tmp_path, "75 lost 143 0", SPOT="1")
    assert code == 0, said
    assert len(started) == 4
    assert len(set(started)) == 1
    creations = [call for call in calls if "queued-resources create" in call]
    assert len(creations) == 2
    assert all("--spot" in call for call in creations)
    assert sum("queued-resources delete" in call for call in calls) == 1
    assert sum(call.startswith("python3 -m uv venv") for call in calls) == 1  # the stand-in's disk outlives its slice


@pytest.mark.parametrize("state", ["SUSPENDED", "SUSPENDING", "FAILED"])
def test_tpu_asks_for_another_slice_when_one_is_gone_before_it_is_there(shell, tmp_path, state):
    code, said, calls, started = tpu(shell, tmp_path, "0", FIRST=state)
    assert code == 0, said
    assert sum("queued-resources create" in call for call in calls) == 2
    assert len(started) == 1


@pytest.mark.parametrize("problem", [1, 2])
def test_tpu_ends_with_what_medseg_explains(shell, tmp_path, problem):
    code, said, _, started = tpu(shell, tmp_path, f"{problem} 0")
    assert code == problem, said
    assert len(started) == 1


def test_tpu_gives_up_after_its_starts(shell, tmp_path):
    code, _, _, started = tpu(shell, tmp_path, "75 134 0", STARTS="2")
    assert code == 134
    assert len(started) == 2


def test_tpu_forgets_that_an_earlier_run_was_to_stop(shell, tmp_path):
    (tmp_path / "medseg_jax").mkdir()
    (tmp_path / "medseg_jax" / ".stop").touch()
    code, said, _, started = tpu(shell, tmp_path, "0")
    assert code == 0, said
    assert len(started) == 1


def test_tpu_that_is_to_stop_does_not_start_when_its_connection_breaks(shell, tmp_path):
    code, said, _, started = tpu(shell, tmp_path, "cut 0")
    assert code == 143, said
    assert "stopped and saved" in said
    assert len(started) == 1


# A medseg that trains for long the first time, unless told to save; the second time it is done.
LONG = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
home = pathlib.Path(os.environ["HERE"])
with (home / "started").open("a") as file:
    print(os.getppid(), os.getpid(), file=file, flush=True)
if len((home / "started").read_text().splitlines()) == 1:
    time.sleep(20)
    (home / "survived").touch()
"""
MEANWHILE = f"""
train() {{ exec bash {LAUNCH}/tpu_vm.sh "$@"; }}
(train "$@") & launcher=$!
until read -r waiting medseg < "$HERE/started"; do sleep 0.05; done 2> /dev/null
"""


def meanwhile(shell, home: Path, then: str):
    """Runs `then` while LONG trains; returns once all processes are gone, since they hold the same pipes."""
    (home / "driver").write_text(MEANWHILE + then)
    return tpu(shell, home, "", script=str(home / "driver"), program=LONG)


def test_tpu_stop_lets_medseg_save_and_ends_the_training(shell, tmp_path):
    """pkill finds medseg, and neither the shell that waits for it nor the one that calls pkill."""
    code, said, _, started = meanwhile(shell, tmp_path, f"bash {LAUNCH}/tpu_vm.sh stop && wait $launcher")
    assert code == 143, said
    assert "stopped and saved" in said
    assert len(started) == 1
    assert not (tmp_path / "survived").exists()


def test_tpu_starts_again_when_all_processes_of_a_worker_are_told_to_end(shell, tmp_path):
    """Its machine is taken away: medseg saves, and the shell that waits for it says so."""
    code, said, _, started = meanwhile(shell, tmp_path, "kill -TERM $waiting $medseg; wait $launcher")
    assert code == 0, said
    assert "ended with 75" in said
    assert len(started) == 2


@pytest.mark.parametrize(
    "then",
    [
        'kill -KILL $launcher; (train "$@")',  # the terminal is lost; the same command again
        "kill -KILL $waiting; wait $launcher",  # the connection to a worker is lost; gcloud calls again
    ],
)
def test_tpu_ends_what_still_runs_before_it_starts_again(shell, tmp_path, then):
    code, said, _, started = meanwhile(shell, tmp_path, then)
    assert code == 0, said
    assert len(started) == 2
    assert not (tmp_path / "survived").exists()


# ---------------------------------------------------------------- JobSet


def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def test_the_jobset_is_one():
    jsonschema.Draft202012Validator.check_schema(JOBSET)
    jsonschema.validate(jobset(), JOBSET)


def test_the_jobset_has_a_pod_for_each_host_and_gives_up_on_what_is_explained():
    spec = jobset()["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == rows * columns
    rule = job["podFailurePolicy"]["rules"][0]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [1, 2]}
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert container["command"][:2] == ["medseg", "train"]
    claims = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} <= claims


def test_examples_whose_data_lie_on_a_share_say_so():
    """A config names data beside the code; on a cloud's workers there are none."""
    container = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    command = container["command"] + container["args"]
    guide = (LAUNCH.parent / "docs" / "how-to" / "pods.md").read_text()
    lines = [" ".join(command), *(LAUNCH / "tpu_vm.sh").read_text().splitlines(), *guide.splitlines()]
    examples = [line for line in lines if "train configs/" in line and "--out share/" in line]
    assert len(examples) == 4
    assert all("--data share/data/hippocampus --out share/runs/" in line for line in examples)


def broken(change) -> dict:
    found = copy.deepcopy(jobset())
    change(found["spec"])
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(replicatedJob=s.pop("replicatedJobs")),
        lambda s: s["failurePolicy"].update(maxRestarts="20"),
        lambda s: s["failurePolicy"]["rules"][0].update(action="Restart"),
        lambda s: s["failurePolicy"].update(restartStrategy="Always"),
        lambda s: s["replicatedJobs"][0]["template"]["spec"].pop("template"),
        lambda s: s["replicatedJobs"][0]["template"]["spec"].update(backofLimit=0),
        lambda s: s["replicatedJobs"][0]["template"]["spec"]["template"]["spec"].update(restartPolicy="Always"),
        lambda s: s["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0].pop("image"),
        lambda s: s["replicatedJobs"][0].update(name="Hosts of v5e"),
    ],
)
def test_the_schema_sees_mistakes(change):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken(change), JOBSET)
