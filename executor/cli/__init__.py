"""What the commands share: flags, files, progress, printed reports."""
