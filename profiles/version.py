"""The version of the three packages; setup.cfg reads it here."""

VERSION = "0.1.0"
