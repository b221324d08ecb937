"""Tests against a real SLURM. A package, so that this conftest does not hide the one of the other tests."""
