"""What a pipeline does when something goes wrong: it stops with the cause, and goes on as if nothing had been."""

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from lopt_hf.compare.curves import read_curve
from lopt_hf.pipeline.runtime.checkpoint import Manifest
from tests.distributed.pipeline_fault_worker import Fault
from tests.distributed.pipeline_processes import (
    ADDRESSES,
    Host,
    Processes,
    arguments,
    assert_same_model,
    assert_succeeded,
    checkpoints,
    launch_command,
    run,
    two_hosts,
    write_inputs,
)
from tests.tiny import make_dataset

LAYER = "transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward"
IMPATIENT = {"peer_timeout": 5, "start_timeout": 6}
LIMIT = 30  # seconds within which all must have ended
LONG = {"max_steps": 300, "save_steps": 20, "logging_steps": 50}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def reference(inputs: Path) -> Path:
    """A run in which nothing went wrong."""
    assert_succeeded(*run(inputs, inputs / "reference"))
    return inputs / "reference"


def test_a_runs_log_lies_beside_its_model(reference: Path) -> None:
    """Where that of `lopt-hf sft` lies, for `lopt-hf curves`; of all stages."""
    assert list(read_curve(str(reference), "loss")) == list(read_curve(str(reference), "local_loss/block_0"))
    assert list(read_curve(str(reference), "loss")) == list(range(1, 9))
    assert (reference / "trainer_state.json").is_file()


def test_a_checkpoint_names_the_model_that_the_run_started_from(inputs: Path, reference: Path) -> None:
    content = Manifest(reference / "checkpoint-8").content
    found = [content[name] for name in ("model", "model_revision", "dtype")]
    assert found == [str(inputs / "model"), "main", "float32"]


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def has_checkpoint(output_dir: Path) -> Callable[[], bool]:
    return lambda: output_dir.is_dir() and bool(checkpoints(output_dir))


def assert_stopped(codes: list[int | None], outputs: list[str], cause: str, dead: int | None = None) -> None:
    """All have ended, and all that could say so named the same cause."""
    assert None not in codes and 0 not in codes, (codes, [text[-1000:] for text in outputs])
    for rank, text in enumerate(outputs):
        if rank != dead:
            said = [line for line in text.splitlines() if "lopt-hf pipeline: " in line]
            assert len(said) == 1 and cause in said[0], (rank, codes, text[-2000:])


def assert_resumes(inputs: Path, output_dir: Path, reference: Path, **settings: object) -> None:
    assert_succeeded(*run(inputs, output_dir, resume_from_checkpoint="auto", **settings))
    assert_same_model(output_dir, reference)
    assert not list(output_dir.glob("incomplete-*"))


KILLS = [
    (Fault("torch.distributed.isend", 6, ranks=(0,)), 0),  # between the header and the hidden states of a message
    (Fault(LAYER, 6, ranks=(1,)), 1),
    (Fault("lopt_hf.pipeline.runtime.stage_checkpoint.save_optimizer_state", 2, ranks=(2,)), 2),
]


@pytest.mark.parametrize(("fault", "rank"), KILLS, ids=["send", "forward", "save"])
def test_others_name_the_killed_stage_and_the_resumed_run_is_equal(tmp_path, inputs, reference, fault, rank):
    codes, outputs = run(inputs, tmp_path / "out", faults=[fault], timeout=LIMIT)
    assert codes[rank] == -9
    assert_stopped(codes, outputs, f"rank {rank} (stage {rank}) is gone", dead=rank)
    assert_resumes(inputs, tmp_path / "out", reference)


def test_a_kill_before_the_rename_leaves_the_previous_checkpoint_the_last(tmp_path, inputs, reference):
    """All stages are written and the manifest too, but the folder has not got its name."""
    fault = Fault("lopt_hf.pipeline.runtime.checkpoint.Manifest.write", 2, after=True)
    # Rank 2 has the longest stage to come after it, so it is the last one to write.
    slow = Fault("lopt_hf.pipeline.runtime.stage_checkpoint.save_weights", 0, "pause", ranks=(2,), after=True)
    codes, outputs = run(inputs, tmp_path / "out", faults=[fault, slow], timeout=LIMIT)
    assert_stopped(codes, outputs, "rank 2 (stage 2) is gone", dead=2)
    assert checkpoints(tmp_path / "out") == ["checkpoint-2"]
    assert (tmp_path / "out/incomplete-checkpoint-4/checkpoint-4/pipeline.json").is_file()
    folders = Manifest(tmp_path / "out/checkpoint-2").stage_folders
    # The last has tokenizer and configs too
    assert [len(list(folder.iterdir())) for folder in folders] == [8, 8, 13]
    assert_resumes(inputs, tmp_path / "out", reference)


def test_a_kill_while_the_model_is_put_together_leaves_none_that_loads(tmp_path, inputs, reference):
    """Also none of two runs' parts; and the run that goes on from its last step trains no further one."""
    shutil.copytree(reference, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))
    faults = [Fault("lopt_hf.pipeline.runtime.export.safe_open", 2)]
    own = {"resume_from_checkpoint": "auto"}  # the folder is the run's own: else it would refuse to lose a model
    codes, _ = run(inputs, tmp_path / "out", faults=faults, timeout=LIMIT, **IMPATIENT, **own)
    assert sorted(codes) == [-9, 1, 1]
    assert not (tmp_path / "out/model.safetensors.index.json").exists()
    assert_resumes(inputs, tmp_path / "out", reference)
    assert checkpoints(tmp_path / "out") == ["checkpoint-6", "checkpoint-8"]


def test_a_killed_replica_is_named(tmp_path, inputs):
    """Its own stage's other replica learns of it from a collective that breaks, which does not say by whom."""
    settings = {"num_blocks": 2, "data_parallel": 2, **IMPATIENT}
    fault = Fault("accelerate.Accelerator.backward", 3, ranks=(3,))
    codes, outputs = run(inputs, tmp_path / "out", ranks=4, faults=[fault], timeout=LIMIT, **settings)
    assert_stopped(codes, outputs, "rank 3 (stage 1, replica 1) is gone", dead=3)


GROUP = "torch.distributed.new_group"
EARLY = [
    ([Fault("lopt_hf.pipeline.runtime.run.init_world", ranks=(1,))], 1, "did not start within 6 s"),
    # Rank 2 waits for rank 1 to connect, is killed, and then rank 1 finds nobody; rank 0 has nothing to do with it.
    ([Fault(GROUP, 2, "kill_soon", (2,)), Fault(GROUP, 2, "pause", (1,))], 2, "has given no sign of life for 5 s"),
    (
        [Fault("lopt_hf.pipeline.runtime.trainer.load_stage", ranks=(1,))],
        1,
        "",
    ),  # silent, or gone if a channel is open
]


@pytest.mark.parametrize(("faults", "rank", "message"), EARLY, ids=["join", "connect", "load"])
def test_a_stage_that_is_killed_before_training_is_missed(tmp_path, inputs, faults, rank, message):
    codes, outputs = run(inputs, tmp_path / "out", faults=faults, timeout=LIMIT, **IMPATIENT)
    assert_stopped(codes, outputs, f"rank {rank} (stage {rank}) {message}", dead=rank)


@pytest.mark.slow
def test_a_machine_that_sleeps_goes_on(tmp_path, inputs):
    """All processes stand still for longer than `peer_timeout`; none takes that for the others' silence."""
    assert_succeeded(*run(inputs, tmp_path / "reference", **LONG))
    processes = Processes([arguments(inputs, tmp_path / "out", **IMPATIENT, **LONG)] * 3, tmp_path / "logs")
    wait_until(has_checkpoint(tmp_path / "out"))
    processes.signal(signal.SIGSTOP)
    time.sleep(12)
    processes.signal(signal.SIGCONT)
    assert processes.wait(120) == [0, 0, 0], processes.output(0)[-2000:]
    assert_same_model(tmp_path / "out", tmp_path / "reference")


FAILURES = [
    (
        Fault("accelerate.Accelerator.backward", 3, "raise_error", (1,)),
        "rank 1 (stage 1) failed: the test's own error",
    ),
    (
        Fault(LAYER, 5, "make_nan", (0,)),
        "rank 0 (stage 0) failed: the largest hidden state of stage 0 is nan at step 2",
    ),
    (
        Fault("lopt_hf.pipeline.runtime.stage_checkpoint.save_weights", 2, "fill_disk", (2,)),
        "rank 2 (stage 2) failed: [Errno 28] No space",
    ),
]


@pytest.mark.parametrize(("fault", "cause"), FAILURES, ids=["exception", "nan", "disk"])
def test_others_name_the_cause_of_a_stage_that_fails(tmp_path, inputs, fault, cause):
    codes, outputs = run(inputs, tmp_path / "out", faults=[fault], timeout=LIMIT)
    assert_stopped(codes, outputs, cause)


def test_stages_with_other_tokens_stop(tmp_path, inputs):
    rows = make_dataset()
    rows.map(lambda row: {"prompt": row["prompt"].replace("1", "9")}).to_json(tmp_path / "other.json")
    codes, outputs = run(
        inputs, tmp_path / "out", per_rank={1: {"dataset_name": tmp_path / "other.json"}}, timeout=LIMIT
    )
    assert_stopped(codes, outputs, "rank 0 and rank 1 train on different data: step 1, micro-batch 1 with checksum")


def test_stages_with_other_lengths_stop(tmp_path, inputs):
    rows = make_dataset()
    rows.map(lambda row: {"prompt": row["prompt"] + "so"}).to_json(tmp_path / "other.json")
    codes, outputs = run(
        inputs, tmp_path / "out", per_rank={2: {"dataset_name": tmp_path / "other.json"}}, timeout=LIMIT
    )
    assert_stopped(codes, outputs, "rank 1 and rank 2 train on different data: step 1, micro-batch 1 with checksum")


@pytest.mark.parametrize("shorter", [0, 1])
def test_stages_that_end_at_different_steps_stop(tmp_path, inputs, shorter):
    make_dataset().select(range(8)).to_json(tmp_path / "other.json")
    per_rank = {shorter: {"dataset_name": tmp_path / "other.json"}}
    settings = {"max_steps": -1, "num_train_epochs": 1, "train_sampling_strategy": "sequential", "num_blocks": 2}
    codes, outputs = run(inputs, tmp_path / "out", ranks=2, per_rank=per_rank, timeout=LIMIT, **settings)
    causes = [
        "rank 0 ended its training before step 5",
        "rank 0 goes on with step 5, micro-batch 1 after rank 1 ended",
    ]
    assert_stopped(codes, outputs, causes[shorter])


MISMATCHES = [
    (3, {1: {"seed": 7}}, "rank 1 was given seed='7', but rank 0 '0'"),
    (3, {2: {"resume_from_checkpoint": "auto"}}, "rank 2 was given resume_from_checkpoint='"),
    (4, {3: {"num_stages": 2, "data_parallel": 2}}, "rank 3 was given num_stages='2', but rank 0 '4'"),
    (2, {}, "num_processes=2, but num_stages=3 x data_parallel=1 needs 3; launch 3 processes, or change the stages"),
    (3, {1: {"num_stages": 9}}, "rank 1 was given wrong arguments; see its own output"),
    (3, {2: {"output_dir": "elsewhere"}}, "is not the same folder on rank 2 as on rank 0"),
]


@pytest.mark.parametrize(
    ("ranks", "per_rank", "cause"), MISMATCHES, ids=["seed", "resume", "mesh", "few", "wrong", "disk"]
)
def test_processes_with_other_arguments_stop(tmp_path, inputs, reference, ranks, per_rank, cause):
    output_dir = tmp_path / "out"
    if any("resume_from_checkpoint" in settings for settings in per_rank.values()):
        shutil.copytree(reference, output_dir)
    for settings in per_rank.values():
        if "output_dir" in settings:
            settings["output_dir"] = tmp_path / "elsewhere"
    blocks = {"num_blocks": ranks} if ranks == 4 else {}
    codes, outputs = run(inputs, output_dir, ranks=ranks, per_rank=per_rank, timeout=LIMIT, **blocks)
    wrong = next(iter(per_rank), None)
    assert_stopped(codes, outputs, cause, dead=wrong if "wrong arguments" in cause else None)


def test_a_second_start_is_refused_and_leaves_the_running_one_alone(tmp_path, inputs, reference):
    """Also what it is writing at that moment."""
    command = arguments(inputs, tmp_path / "out", resume_from_checkpoint="auto", save_total_limit=4)
    slow = Fault("lopt_hf.pipeline.runtime.stage_checkpoint._save_stage", 0, "pause", ranks=(1,))
    first = Processes([command] * 3, tmp_path / "first", [slow])
    wait_until((tmp_path / "out/incomplete-checkpoint-2/checkpoint-2/stage-0/trainer_state.json").is_file)
    first.signal(signal.SIGSTOP)
    second = Processes([command] * 3, tmp_path / "second")
    codes = second.wait(LIMIT)
    first.signal(signal.SIGCONT)
    assert_stopped(codes, [second.output(rank) for rank in range(3)], "is used by another run")
    assert codes == [2] * 3
    assert_succeeded(first.wait(LIMIT), [first.output(rank) for rank in range(3)])
    assert_same_model(tmp_path / "out", reference)
    for name in checkpoints(tmp_path / "out"):
        assert all(folder.is_dir() for folder in Manifest(tmp_path / "out" / name).stage_folders), name


def test_a_checkpoint_of_other_blocks_is_bad_input(tmp_path, inputs, reference):
    """For whoever asked, on all ranks: more stages than the checkpoint's have blocks that it does not know."""
    shutil.copytree(reference / "checkpoint-8", tmp_path / "out/checkpoint-8")
    again = {"num_blocks": 4, "resume_from_checkpoint": "auto"}
    codes, outputs = run(inputs, tmp_path / "out", ranks=4, timeout=LIMIT, **again)
    assert_stopped(codes, outputs, "was trained with num_blocks=3, but this run has num_blocks=4")
    assert codes == [2] * 4 and not any("Traceback" in text for text in outputs)


def test_a_slow_stage_does_not_fill_memory(tmp_path, inputs):
    """Over 500 steps no stage holds more hidden states than its channels do, and resident memory stays."""
    faults = [
        Fault(LAYER, 0, "slow_down", ranks=(2,)),
        Fault("lopt_hf.pipeline.runtime.channel._Message", 0, "note_memory", after=True),
    ]
    settings = {"max_steps": 500, "save_strategy": "no", "per_device_train_batch_size": 16, "logging_steps": 100}
    codes, outputs = run(inputs, tmp_path / "out", faults=faults, **settings)
    assert_succeeded(codes, outputs)
    depth = 2  # the default of channel_depth
    for rank, text in enumerate(outputs):
        notes = [tuple(map(int, line.split()[-2:])) for line in text.splitlines() if "memory: " in line]
        ends = 2 if rank == 1 else 1
        # Per end: what waits, what is on its way, and what is about to wait or has just been taken.
        assert max(alive for alive, _ in notes) <= ends * (depth + 2), rank
        grown = notes[-1][1] - notes[len(notes) // 5][1]
        print(
            f"rank {rank}: {max(a for a, _ in notes)} alive, {notes[-1][1] / 2**20:.0f} MiB, grown {grown / 2**20:.2f}"
        )
        assert len(notes) == ends * 500 and grown < 2 * 2**20, rank


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_each_stage_killed_at_20_random_moments(tmp_path, inputs, rank):
    """From the first import on to the end; the resumed run ends bit-identical, whatever the kill left."""
    settings = {"max_steps": 24, "save_steps": 1}
    commands = [arguments(inputs, tmp_path / "reference", **settings)] * 3
    started = time.monotonic()
    processes = Processes(commands, tmp_path / "reference-logs")
    assert processes.wait(120) == [0, 0, 0]
    duration = time.monotonic() - started
    moments = random.Random(rank)
    kills = 0
    longest = 0.0
    for attempt in range(100):
        output_dir = tmp_path / f"out-{attempt}"
        commands = [arguments(inputs, output_dir, **settings, start_timeout=20)] * 3
        processes = Processes(commands, tmp_path / f"logs-{attempt}")
        time.sleep(moments.uniform(0, duration))
        if not processes.kill(rank):
            processes.wait(60)
            continue
        killed = time.monotonic()
        codes = processes.wait(60)
        seconds = time.monotonic() - killed
        outputs = [processes.output(other) for other in range(3)]
        if codes.count(0) == 2:  # it was on its way out
            continue
        saved = checkpoints(output_dir) if output_dir.exists() else []
        print(f"rank {rank}, kill {kills}: {seconds:.1f} s, {codes}, {saved}", flush=True)
        assert_stopped(codes, outputs, f"rank {rank} (stage {rank}) ", dead=rank)
        for name in saved:
            assert len(Manifest(output_dir / name).stage_folders) == 3
        assert_resumes(inputs, output_dir, tmp_path / "reference", **settings)
        shutil.rmtree(output_dir)
        kills += 1
        longest = max(longest, seconds)
        if kills == 20:
            break
    print(f"rank {rank}: {kills} kills, the others ended within {longest:.1f} s")
    assert kills == 20 and longest <= LIMIT


# ---- Launched as a user does: slow, since every process imports everything ----


def process_of_rank(launcher: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    children = psutil.Process(launcher.pid).children(recursive=True)
    return next(child for child in children if child.environ().get("RANK") == str(rank))


@pytest.mark.slow
def test_a_launcher_with_restarts_goes_on_by_itself(tmp_path, inputs):
    """`--max_restarts` of `accelerate launch` and `resume_from_checkpoint: auto` need nobody to look after a run."""
    assert_succeeded(*run(inputs, tmp_path / "reference", **LONG))
    command = launch_command(1, 0, 3, "--main_process_port", "0", "--max_restarts", "1")
    command += arguments(inputs, tmp_path / "out", resume_from_checkpoint="auto", **LONG)
    launcher = Host().start(command, tmp_path / "log")
    wait_until(has_checkpoint(tmp_path / "out"))
    process_of_rank(launcher, 1).kill()
    assert launcher.wait(300) == 0, (tmp_path / "log").read_text()[-3000:]
    assert (tmp_path / "log").read_text().count("stops: rank 1 (stage 1) is gone") == 2
    assert_same_model(tmp_path / "out", tmp_path / "reference")


@pytest.mark.slow
def test_bad_input_ends_the_command_with_status_2(tmp_path, inputs):
    """One line names the cause; nothing of a launcher's comes after it."""
    given = arguments(inputs, tmp_path / "out", use_peft=True, lora_target_modules="nowhere")
    launcher = Host().start([sys.executable, "-m", "lopt_hf.cli", "pipeline", *given], tmp_path / "log")
    assert launcher.wait(120) == 2
    text = (tmp_path / "log").read_text()
    said = [line for line in text.splitlines() if line.startswith("lopt-hf pipeline: ")]
    assert len(said) == 1 and "nowhere" in said[0]
    assert "Traceback" not in text and "exitcode" not in text and "has not ended" not in text


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_ends_all_processes(tmp_path, inputs, number):
    """And it says how to go on."""
    command = [sys.executable, "-m", "lopt_hf.cli", "pipeline", *arguments(inputs, tmp_path / "out", **LONG)]
    launcher = Host().start(command, tmp_path / "log")
    wait_until(has_checkpoint(tmp_path / "out"))
    processes = psutil.Process(launcher.pid).children(recursive=True)
    launcher.send_signal(number)
    assert launcher.wait(LIMIT) != 0
    assert len(processes) >= 4 and not psutil.wait_procs(processes, timeout=1)[1]
    assert "with --resume_from_checkpoint auto goes on from it" in (tmp_path / "log").read_text()


def launch_on(hosts: Sequence[Host], logs: Path, command: Sequence[str]) -> list[subprocess.Popen[bytes]]:
    """One process on each host."""
    options = ["--main_process_ip", ADDRESSES[0], "--main_process_port", "29577"]
    starts = [launch_command(2, machine, 2, *options) for machine in range(2)]
    return [
        host.start([*start, *command], logs / f"host-{i}")
        for i, (host, start) in enumerate(zip(hosts, starts, strict=True))
    ]


@pytest.mark.slow
def test_two_hosts_and_a_link_that_is_cut(tmp_path, inputs):
    """Network namespaces: both sides end and say why, and the run that goes on is that of one host."""
    settings = {"num_blocks": 2, **LONG}
    assert_succeeded(*run(inputs, tmp_path / "one-host", ranks=2, **settings))
    command = arguments(inputs, tmp_path / "out", resume_from_checkpoint="auto", **settings)
    try:
        with two_hosts() as (*hosts, cut):
            launchers = launch_on(hosts, tmp_path, command)
            wait_until(has_checkpoint(tmp_path / "out"))
            cut()
            started = time.monotonic()
            codes = [launcher.wait(60) for launcher in launchers]
            seconds = time.monotonic() - started
    except PermissionError as error:
        pytest.skip(f"cannot make network namespaces here: {error}")
    outputs = [(tmp_path / f"host-{host}").read_text() for host in range(2)]
    print(f"both ended after {seconds:.1f} s with {checkpoints(tmp_path / 'out')}")
    assert codes == [1, 1] and seconds < 20 + 5 + 5  # peer_timeout, grace, and the launcher
    assert "rank 0 stops: rank 1 (stage 1) has given no sign of life for 20 s" in outputs[0]
    assert "rank 1 stops: no contact with the rendezvous store for 20 s" in outputs[1]
    assert "checkpoint-300" not in checkpoints(tmp_path / "out")
    with two_hosts() as (*hosts, _):
        launchers = launch_on(hosts, tmp_path, command)
        assert [launcher.wait(120) for launcher in launchers] == [0, 0], (tmp_path / "host-0").read_text()[-3000:]
    assert_same_model(tmp_path / "out", tmp_path / "one-host")
