"""Plans for sparse update: released schemes, tables of what each entry gains, and the exact choice under a budget."""

from edgetune.sparse.contributions import Contributions, Trials, fisher_contributions, measure_contributions
from edgetune.sparse.scheme import (
    Scheme,
    place_windows,
    released_plan,
    released_schemes,
    scheme_learns,
    scheme_plan,
    sparse_learns,
    sparse_plan,
)
from edgetune.sparse.select import choose_sparse

__all__ = [
    "Contributions",
    "Scheme",
    "Trials",
    "choose_sparse",
    "fisher_contributions",
    "measure_contributions",
    "place_windows",
    "released_plan",
    "released_schemes",
    "scheme_learns",
    "scheme_plan",
    "sparse_learns",
    "sparse_plan",
]
