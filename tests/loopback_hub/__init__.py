"""A Hub on 127.0.0.1 that the real `huggingface_hub` client pushes to and pulls from.

Nothing of the client is replaced. What the real Hub does beyond this (pull requests, Xet storage, pages of more than
a thousand files, searching) is left out; a route that does not exist answers with status 404 and says so.
"""

from .client import Waits
from .faults import Fault
from .hub import LoopbackHub
from .messages import Record
from .repositories import Blob, Commit, Repository, User


__all__ = ["Blob", "Commit", "Fault", "LoopbackHub", "Record", "Repository", "User", "Waits"]
