"""Tasks that srun started find each other without torchrun: its variables, from Slurm's.

srun --ntasks 16 --ntasks-per-node 8 python launch/train.py --out out/train
"""

import re
from collections.abc import Mapping

from hla_dist.processes.rendezvous import number

_PORTS = 10000  # of two steps on one machine, those of other jobs included, each has its own


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for this task; none where srun started no more than one, or nothing did.

    Rank 0's machine is the step's first. The port follows from the job's and the step's number; MASTER_ADDR and
    MASTER_PORT overrule both. (SLURM_NTASKS says nothing: a script of sbatch has it too, and is one process.) Raises
    UserError for a variable that is no number.
    """
    tasks = number(environ, "SLURM_STEP_NUM_TASKS", 1)
    if tasks == 1:
        return {}
    names = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}
    values = {name: number(environ, slurm, 0) for name, slurm in names.items()}
    machines = _tasks_per_machine(environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)))
    values |= {"WORLD_SIZE": tasks, "LOCAL_WORLD_SIZE": machines[number(environ, "SLURM_NODEID", 0)]}
    step = number(environ, "SLURM_JOB_ID", 0) + 101 * number(environ, "SLURM_STEP_ID", 0)
    values["MASTER_PORT"] = 20000 + step % _PORTS
    first = "127.0.0.1" if len(machines) == 1 else _first_machine(environ.get("SLURM_STEP_NODELIST", "localhost"))
    given = {name: environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in environ}
    return {"MASTER_ADDR": first} | {name: str(value) for name, value in values.items()} | given


def _tasks_per_machine(text: str) -> list[int]:
    """Slurm's short form: ``8(x2),4`` is 8, 8 and 4."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, machines in counts for _ in range(int(machines or 1))]


def _first_machine(names: str) -> str:
    """The first name of Slurm's short form: ``gpu[07-08,12],x1`` begins with gpu07."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", re.match(r"(?:[^,[]|\[[^]]*\])*", names)[0])  # type: ignore[index]
