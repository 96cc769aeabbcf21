"""The loop over tasks, one worker a channel, and what it records."""
