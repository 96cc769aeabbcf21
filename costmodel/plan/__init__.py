"""What is decided before a run: the work, the policy, where it cuts, which moves it needs."""
