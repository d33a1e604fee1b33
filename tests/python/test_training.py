"""An unchanged training script gives the same losses and the same adapters with the co-process as without it."""

from __future__ import annotations

import pytest
from compare import assert_same_log, assert_same_tensors, load_log
from conftest import Daemon, Runs, run_script

TRAINER, LOOP = "train_trainer.py", "train_loop.py"
SAVE = ("--save", 10)  # The reference runs also write the checkpoints that the resume tests start from.


def assert_trains_alike(runs: Runs, *args: str, reference: tuple = (), ranks: int = 1, losses: float = 1e-5) -> None:
    ours = runs.get(TRAINER, *args, remote=True, ranks=ranks)
    theirs = runs.get(TRAINER, *reference, remote=False, ranks=ranks)
    assert_same_log(ours.with_suffix(".json"), theirs.with_suffix(".json"), losses)
    assert_same_tensors(ours.with_suffix(".pt"), theirs.with_suffix(".pt"), 1e-4)


def test_trainer_with_one_rank(runs: Runs, daemon: Daemon) -> None:
    before = daemon.status()["totals"]
    assert_trains_alike(runs, *SAVE, reference=SAVE)
    after = daemon.status()["totals"]
    done = {key: after[key] - before[key] for key in after}
    # 20 steps of 2 micro-batches through 3 layers.
    assert done["forward_requests"] == done["backward_requests"] == 120
    assert done["fetch_requests"] == 0 and done["steps"] == 20 and done["errors"] == 0


@pytest.mark.parametrize("mode, fetches", [("no", 0), ("re", 120)])
def test_trainer_with_activation_checkpointing(runs: Runs, daemon: Daemon, mode: str, fetches: int) -> None:
    before = daemon.status()["totals"]
    assert_trains_alike(runs, "--checkpointing", mode, reference=SAVE)
    after = daemon.status()["totals"]
    assert after["forward_requests"] - before["forward_requests"] == 120, "one forward per layer and micro-batch"
    assert after["fetch_requests"] - before["fetch_requests"] == fetches


def test_trainer_with_two_ranks(runs: Runs, daemon: Daemon) -> None:
    before = daemon.status()["totals"]
    assert_trains_alike(runs, ranks=2)
    after = daemon.status()["totals"]
    assert after["forward_requests"] - before["forward_requests"] == 240
    assert after["steps"] - before["steps"] == 20


def test_trainer_with_two_ranks_and_activation_checkpointing(runs: Runs, daemon: Daemon) -> None:
    before = daemon.status()["totals"]
    assert_trains_alike(runs, "--checkpointing", "no", ranks=2)
    assert daemon.status()["totals"]["forward_requests"] - before["forward_requests"] == 240


def test_loop_with_two_ranks_unequal_tokens_and_a_rank_without_any(runs: Runs) -> None:
    ours, theirs = runs.get(LOOP, remote=True, ranks=2), runs.get(LOOP, remote=False, ranks=2)
    for rank in range(2):
        a, b = load_log(f"{ours}.{rank}.json"), load_log(f"{theirs}.{rank}.json")
        assert len(a) == len(b) == 6
        for step, (mine, plain) in enumerate(zip(a, b, strict=True)):
            assert mine == pytest.approx(plain, abs=2e-5, rel=1e-5), f"rank {rank}, step {step}: loss, gradient norm"
        assert_same_tensors(f"{ours}.{rank}.pt", f"{theirs}.{rank}.pt", 1e-4)


def test_loop_with_two_ranks_and_nothing_but_experts_trained(runs: Runs) -> None:
    args = ("--experts-only", "--steps", 3)
    ours, theirs = runs.get(LOOP, *args, remote=True, ranks=2), runs.get(LOOP, *args, remote=False, ranks=2)
    for rank in range(2):
        assert_same_tensors(f"{ours}.{rank}.pt", f"{theirs}.{rank}.pt", 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_trainer_with_nothing_but_experts_trained(runs: Runs, ranks: int) -> None:
    assert_trains_alike(runs, "--experts-only", reference=("--experts-only",), ranks=ranks)


@pytest.mark.slow
def test_trainer_with_evaluation_in_between(runs: Runs) -> None:
    assert_trains_alike(runs, "--evaluate", 5, reference=("--evaluate", 5))


@pytest.mark.slow
def test_trainer_with_data_loader_workers_that_fork(runs: Runs) -> None:
    assert_trains_alike(runs, "--workers", 2, reference=SAVE)


def test_bf16_losses_deviate_no_more_than_those_of_plain_bf16(runs: Runs, tiny, daemon: Daemon) -> None:
    bf16 = Daemon(tiny, "--threads", "1")
    try:
        ours = load_log(runs.get(TRAINER, "--bf16", remote=True, daemon=bf16).with_suffix(".json"))
    finally:
        bf16.stop()
    plain = load_log(runs.get(TRAINER, "--bf16", remote=False).with_suffix(".json"))
    exact = load_log(runs.get(TRAINER, *SAVE, remote=False).with_suffix(".json"))

    def deviation(log: list) -> float:
        pairs = [(a[2], b[2]) for a, b in zip(log, exact, strict=True) if a[1] == b[1] == "loss"]
        assert len(pairs) == 20
        return (sum((a - b) ** 2 for a, b in pairs) / len(pairs)) ** 0.5

    print(f"root mean square deviation from fp32: ours {deviation(ours):.2e}, plain bf16 {deviation(plain):.2e}")
    assert deviation(ours) <= 1.2 * deviation(plain)


def test_torchrun_without_ddp_is_refused(tiny, daemon: Daemon, work) -> None:
    output = run_script("train_unjoined.py", "--model", tiny, address=daemon.address, ranks=2, fails=True)
    assert "torch.distributed has 2 ranks, but this rank's model was never joined" in output
    assert "kt_coproc.join()" in output
