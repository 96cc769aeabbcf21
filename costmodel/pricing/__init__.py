"""What a policy costs: bytes on every tier, seconds on every channel."""
