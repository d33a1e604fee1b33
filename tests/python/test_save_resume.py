"""Checkpoints: resumed bit for bit, and exchanged with plain transformers and PEFT."""

from __future__ import annotations

from pathlib import Path

from compare import assert_same_tensors, load_log
from conftest import Daemon, Runs, run_script

TRAINER = "train_trainer.py"
SAVE = ("--save", 10)


def resume(runs: Runs, tiny: Path, saved_by: Path, out: Path, daemon: Daemon | None, ranks: int = 1) -> None:
    run_script(
        TRAINER,
        "--model",
        tiny,
        "--out",
        out,
        "--resume",
        f"{saved_by}.trainer/checkpoint-10",
        address=daemon.address if daemon else None,
        ranks=ranks,
    )


def test_resumed_run_is_bit_for_bit_the_straight_one_in_a_new_job_on_the_same_daemon(
    runs: Runs, tiny: Path, daemon: Daemon, work: Path
) -> None:
    straight = runs.get(TRAINER, *SAVE, remote=True)
    pid, loads = daemon.status()["pid"], daemon.status()["load"]
    resume(runs, tiny, straight, work / "resumed", daemon)
    assert_same_tensors(work / "resumed.pt", straight.with_suffix(".pt"), 0)
    ours = load_log(work / "resumed.json")
    assert ours == [entry for entry in load_log(straight.with_suffix(".json")) if entry[0] > 10]
    status = daemon.status()
    assert (status["pid"], status["load"]) == (pid, loads), "the weights were not loaded again"


def test_resumed_run_on_a_restarted_daemon_is_the_same(runs: Runs, tiny: Path, work: Path) -> None:
    straight = runs.get(TRAINER, *SAVE, remote=True)
    fresh = Daemon(tiny, "--weight-format", "fp32", "--threads", "1")
    try:
        resume(runs, tiny, straight, work / "restarted", fresh)
    finally:
        fresh.stop()
    assert_same_tensors(work / "restarted.pt", straight.with_suffix(".pt"), 0)


def test_checkpoint_of_ours_resumes_without_us(runs: Runs, tiny: Path, work: Path) -> None:
    resume(runs, tiny, runs.get(TRAINER, *SAVE, remote=True), work / "ours-plain", None)
    straight = runs.get(TRAINER, *SAVE, remote=False)
    assert_same_tensors(work / "ours-plain.pt", straight.with_suffix(".pt"), 1e-4)


def test_checkpoint_of_plain_peft_resumes_with_us(runs: Runs, tiny: Path, work: Path, daemon: Daemon) -> None:
    straight = runs.get(TRAINER, *SAVE, remote=False)
    resume(runs, tiny, straight, work / "plain-ours", daemon)
    assert_same_tensors(work / "plain-ours.pt", straight.with_suffix(".pt"), 1e-4)


def test_checkpoint_of_ours_has_the_files_and_tensors_of_plain_peft(runs: Runs) -> None:
    import os

    import torch
    from safetensors import safe_open

    ours, theirs = (Path(f"{runs.get(TRAINER, *SAVE, remote=r)}.trainer/checkpoint-10") for r in (True, False))
    assert sorted(os.listdir(ours)) == sorted(os.listdir(theirs))
    shapes = []
    for directory in (ours, theirs):
        with safe_open(directory / "adapter_model.safetensors", "pt") as file:
            names = file.keys()  # Not a mapping.
            shapes.append({name: tuple(file.get_slice(name).get_shape()) for name in names})
    assert shapes[0] == shapes[1] and any("experts" in key for key in shapes[0])
    states = [torch.load(directory / "optimizer.pt") for directory in (ours, theirs)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for number, plain in states[1]["state"].items():
        mine = states[0]["state"][number]
        assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in plain.items()}
        assert float(mine["step"]) == float(plain["step"]) == 10
