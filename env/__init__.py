"""The decision problem: proxy tasks, episodes on them, and the Gymnasium environments, which an import registers."""

from .registration import CONTROL_ENV_ID, ENV_ID

__all__ = ["CONTROL_ENV_ID", "ENV_ID"]
