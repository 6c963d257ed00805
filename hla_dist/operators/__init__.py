"""The mathematics in plain torch: operators as cascades, gates, blocks, stages, segment algebra."""

from hla_dist.operators.ahla import AHLA
from hla_dist.operators.cascade import Operator
from hla_dist.operators.hla2 import HLA2
from hla_dist.operators.hla3 import HLA3
from hla_dist.operators.linear_attention import LINEAR_ATTENTION

NAMED: dict[str, Operator] = {}  # those with a public function, by its name
OPERATORS: dict[str, Operator] = {}  # every cascade: also the forms that a mask or a decay form chooses


def register(operator: Operator) -> None:
    """Make an operator known: functions, layers and programs find it by its name."""
    NAMED[operator.name] = operator
    OPERATORS.update({form.name: form for form in (operator, *operator.forms.values())})


for _operator in (HLA2, AHLA, HLA3, LINEAR_ATTENTION):
    register(_operator)
