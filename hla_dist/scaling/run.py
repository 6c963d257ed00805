"""All cases of a configuration, one after the other, each on a group of the first ranks."""

import gc
import sys
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from hla_dist.parallel.collectives import all_gather_objects, resolve_group
from hla_dist.scaling.config import PlannedCase, ScalingConfig
from hla_dist.scaling.measure import row
from hla_dist.scaling.model import ModelCase
from hla_dist.scaling.operator import OperatorCase

KINDS: dict[str, Any] = {"operator": OperatorCase, "model": ModelCase}
WARM_UP_TOKENS = 2048  # a rank


def run_cases(config: ScalingConfig, cases: list[PlannedCase], device: torch.device) -> list[dict[str, Any]]:
    """The rows of ``cases``, on every rank of the world; ranks outside a case's group wait for the others."""
    rank = dist.get_rank()
    groups = {n: dist.new_group(list(range(n))) for n in sorted({case.ranks for case in cases})}
    rows: list[dict[str, Any]] = []
    bar = tqdm(cases, disable=rank != 0, unit="case", dynamic_ncols=True, mininterval=0.5, file=sys.stderr)
    for case in bar:
        bar.set_postfix_str(f"{case.what}, {case.tokens:,} tokens over {case.ranks} rank(s)")
        figures = measured(config, case, groups[case.ranks], device) if rank < case.ranks else None
        rows.append(all_gather_objects(figures, resolve_group(dist.group.WORLD))[0])
    return rows


def measured(config: ScalingConfig, case: PlannedCase, group: Any, device: torch.device) -> dict[str, Any]:
    """One row; a short call first, so that libraries are loaded and the ranks have agreed on what they send."""
    pg, kind = resolve_group(group), KINDS[case.what]
    warm = kind(config, pg, min(case.tokens, WARM_UP_TOKENS * case.ranks), device)
    warm.run()
    del warm
    problem = kind(config, pg, case.tokens, device)
    samples: list[Any] = []
    result = None
    for _ in range(config.rounds):
        del result  # it would count in the next round's peak
        result, sample = problem.run()
        samples.append(sample)
    gc.collect()
    figures: dict[str, Any] = {"what": case.what, "series": list(case.series), "ranks": case.ranks}
    figures |= {"tokens": case.tokens, **row(samples, pg)}
    figures["tokens_per_s"] = case.tokens / figures["seconds"]
    figures["us_per_token"] = figures["seconds"] / case.tokens * 1e6
    figures["errors"] = problem.errors(result) if config.check else {}
    return figures
