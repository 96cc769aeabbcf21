"""What the commands share: flags, printed reports, pictures."""
