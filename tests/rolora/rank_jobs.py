"""Several ranks of one program: by torchrun, or in forks with what torchrun tells its ranks."""

import contextlib
import os
import subprocess
import sys
import time

from torch.distributed import TCPStore

TRAIN = ("-m", "rolora.train")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def torchrun(count, *args, program=TRAIN):
    """The launcher itself, which loads torch anew in each rank: what is about it needs it."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [sys.executable, "-m", *launcher, *program, *map(str, args)]
    pipe = subprocess.PIPE
    environment = os.environ | ONE_THREAD
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def finished(process):
    out, err = process.communicate(timeout=1800)
    return process.returncode, out, err


def ranks(python, count, *args, program=TRAIN):
    """(exit code or None, standard output, standard error) of a job of `count` ranks.

    As torchrun's agent, this process holds the store at which they meet. Where a rank has failed the
    others have a minute to end, too.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    told = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    } | ONE_THREAD
    with contextlib.ExitStack() as stack:
        job = []
        for number in range(count):
            mine = {"RANK": str(number), "LOCAL_RANK": str(number)}
            job.append(python.start(*program, *args, env=told | mine))
            stack.callback(job[-1].kill)
        end = time.monotonic() + 1800
        while None in (codes := [rank.poll() for rank in job]) and time.monotonic() < end:
            if any(codes):
                end = min(end, time.monotonic() + 60)
            time.sleep(0.02)
    code = next((code for code in codes if code != 0), 0)
    return code, "".join(rank.out for rank in job), "".join(rank.err for rank in job)
