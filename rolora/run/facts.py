"""What an adapter's card tells of the run that made it."""

from __future__ import annotations

from rolora.config import settled
from rolora.hf.license import license_of
from rolora.run import base_model, card, private
from rolora.run.job import Job


def of(
    job: Job,
    rows: list[dict],
    test: dict[str, float] | None,
    last: dict[str, float],
    releases: int | None = None,
) -> card.Facts:
    """The facts of a run that recorded `rows`: judged on the `test` examples, or by the `last`
    evaluation. `releases`: of a private run, all that it was charged for.
    """
    config = job.config
    f, d = config.federation, config.data
    name = "built-in text"
    if d.train_file or d.dataset or d.benchmark:
        name = card.name_of_data(d.train_file or d.dataset or str(d.benchmark))
    other = name if d.eval_file is None else card.name_of_data(d.eval_file)
    held = other if job.test is None and d.eval_file else f"{name}, held out"
    data = [("training", name, sum(map(len, job.clients)))]
    if job.test is None:
        data.append(("evaluation", held, len(job.evaluation)))
    else:
        data.append(("validation", held, len(job.evaluation)))
        data.append(("evaluation", other, len(job.test)))
    rounds = rows[-1]["round"]
    privacy = None
    if config.privacy.dp_clip is not None:
        privacy = private.text(config, rounds, releases)
    return card.Facts(
        task=config.task.task_type or "",
        method=card.name_of_data(f.method),
        rounds=rounds,
        clients=f.clients,
        clients_per_round=settled(f.clients_per_round),
        data=data,
        metrics=last if test is None else test,
        judged_on=data[-1][1],
        bytes_up=sum(row["bytes_up"] for row in rows),
        bytes_down=sum(row["bytes_down"] for row in rows),
        privacy=privacy,
        license=license_of(base_model.name_of(config)),
    )
