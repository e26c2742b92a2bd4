"""``windowkv-edge eval``: every policy, budget and cell type from one prefill per prompt."""

from __future__ import annotations

from .branch import Branches
from .case import Case, EvalError
from .chat import Conversation, conversations
from .fidelity import fidelity_cases
from .generate import GenerateCase, Generator, generate_cases
from .needle import needle_cases
from .prose import prose
from .records import Records, read_records
from .ruler import ruler_cases
from .run import FidelityCase, Plan, Runner
from .sources import fingerprint, hay_tokens, read_texts
from .style import Style
from .tasks import tasks_cases
from .turns import turns_cases

__all__ = [
    "Branches",
    "Case",
    "Conversation",
    "EvalError",
    "FidelityCase",
    "GenerateCase",
    "Generator",
    "Plan",
    "Records",
    "Runner",
    "Style",
    "conversations",
    "fidelity_cases",
    "fingerprint",
    "generate_cases",
    "hay_tokens",
    "needle_cases",
    "prose",
    "read_records",
    "read_texts",
    "ruler_cases",
    "tasks_cases",
    "turns_cases",
]
