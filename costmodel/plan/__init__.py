"""The plan of a run: the workload, the policy, its cuts, and the moves that it needs."""
