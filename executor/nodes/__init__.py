"""Jobs on several machines: what each node does, and who hands prompts to whom."""
