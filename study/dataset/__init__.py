"""Data sets of allocation decisions: what was seen, decided and reached in many runs, for research."""

from .read import TrialsDataset, open_dataset, sample

__all__ = ["TrialsDataset", "open_dataset", "sample"]
