"""Which operator learns what: made tasks, mixers at equal parameters, a resumable grid of runs, one report."""
