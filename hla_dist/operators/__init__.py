"""The mathematics in plain torch: operators as cascades, gates, blocks, stages, segment algebra."""

from __future__ import annotations

from hla_dist.operators.ahla import AHLA
from hla_dist.operators.cascade import Operator
from hla_dist.operators.hla2 import HLA2, HLA2_PREFIX
from hla_dist.operators.hla2_paper import HLA2_PAPER
from hla_dist.operators.hla3 import HLA3
from hla_dist.operators.linear_attention import LINEAR_ATTENTION

OPERATORS: dict[str, Operator] = {op.name: op for op in (LINEAR_ATTENTION, HLA2, HLA2_PREFIX, HLA2_PAPER, AHLA, HLA3)}
