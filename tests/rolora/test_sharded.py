"""A base in parts on several processes: the bits of one process, a part of the memory, and one line
for what its ranks could not do in step.
"""

import pytest

from rolora import config
from rolora.errors import BadInput
from rolora.run.sharded import of_a_run
from tests.rolora.commands import bits, small
from tests.rolora.rank_jobs import ONE_THREAD, ranks

# Says how many bytes of frozen weights this rank holds when the model is prepared.
PROGRAM = """
from torch.distributed.tensor import DTensor

from rolora import cli, train
from rolora.run import session
from rolora_kernels import gemm

gemm.ahead, gemm._WORTH = lambda: True, 1  # as where a library is called by its name
whole = session.prepare


def watched(*arguments):
    made = whole(*arguments)
    whole_ones = [n for n, p in made.model.named_parameters() if not isinstance(p, DTensor)]
    frozen = [p for p in made.model.parameters() if isinstance(p, DTensor)]
    mine = sum(p.to_local().numel() * p.element_size() for p in frozen)
    total = sum(p.numel() * p.element_size() for p in frozen)
    print(" ".join(["held", str(mine), str(total), *whole_ones]) + "\\n", end="", flush=True)
    return made


session.prepare = watched
cli.run(train.command)
"""


def alone(python, program, *flags):
    """The same program in one process."""
    code, _, err = python.run(program, *flags, env=ONE_THREAD)
    assert code == 0, err[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, family, extra",
    [
        (2, "llama", {"dropout": 0.1, "exchange-dtype": "int8", "target-modules": "all-linear"}),
        (3, "roberta", {"method": "flora", "gradient-checkpointing": True, "schedule": "AB"}),
    ],
    ids=["two ranks", "three ranks, every client's own change"],
)
def test_the_bits_of_one_process_and_a_part_of_its_memory(
    count, family, extra, files, tmp_path, python
):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    flags = small(files, family, rounds=2, threads=1, **extra)
    alone(python, program, *flags, "--output-dir", tmp_path / "alone")
    sharded = [*flags, "--base-sharding", "--output-dir", tmp_path / "parts"]
    code, out, err = ranks(python, count, *sharded, program=(program,))
    assert code == 0, err[-2000:]
    assert out.count("round 2/2") == 1, "one rank speaks"
    assert bits(tmp_path / "parts") == bits(tmp_path / "alone")
    held = [line.split()[1:] for line in out.splitlines() if line.startswith("held ")]
    assert len(held) == count
    for _, _, *names in held:
        assert all("lora_" in name or name.startswith(("score", "classifier")) for name in names)
    parts, totals = ([int(row[i]) for row in held] for i in (0, 1))
    assert sum(parts) >= totals[0] > 0 and max(parts) < 1.2 * totals[0] / count
    resumed = ("--resume", "--rounds", 3, "--output-dir", tmp_path / "parts")
    code, _, err = ranks(python, 2, *resumed, program=(program,))
    assert code == 0, err[-2000:]
    alone(python, program, "--resume", "--rounds", 3, "--output-dir", tmp_path / "alone")
    assert bits(tmp_path / "parts") == bits(tmp_path / "alone")


@pytest.mark.parametrize(
    "options, flag",
    [
        ({"engine": "batched"}, "--engine batched"),
        ({"quantize": "nf4"}, "--quantize nf4"),
        ({"init": "pissa"}, "--init pissa"),
        ({"deadline": 3.0}, "--deadline"),
        ({"dp_clip": 1.0, "dp_noise": 1.0}, "--dp-clip"),
        ({"samples": 2}, "--samples"),
        ({"secure_aggregation": True}, "--secure-aggregation"),
        ({"sampling": "poisson"}, "--sampling poisson"),
        ({"buffer": 2}, "--buffer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_ranks_could_not_do_in_step_is_refused_by_name(options, flag, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = config.Config().with_values(base_sharding=True, **options)
    with pytest.raises(BadInput, match=f"^--base-sharding does not go with {flag} "):
        of_a_run(asked, elsewhere=False)


def test_clients_elsewhere_say_it_themselves():
    asked = config.Config().with_values(base_sharding=True)
    with pytest.raises(BadInput, match=r"rolora\.worker --base-sharding"):
        of_a_run(asked, elsewhere=True)


def test_the_plan_says_what_a_rank_holds(files, python):
    """42,144 frozen values of fp32 in all; what a block has more than the half is gathered."""
    flags = (*small(files), "--base-sharding", "--dry-run")
    code, out, _ = python.run("-m", "rolora.train", *flags, env={"WORLD_SIZE": "2"})
    assert code == 0 and "a rank of 2 holds 0.1 MiB of frozen weights and gathers" in out


def test_one_process_is_told_how_to_start_several(files, tmp_path, call):
    code, _, err = call(*small(files), "--base-sharding", "--output-dir", tmp_path / "run")
    assert code == 2 and "torchrun --nproc-per-node" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
