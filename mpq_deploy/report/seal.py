"""The digest that report.json carries: a figure that was changed after the report was written is noticed.

It is of the values, not of the text: indentation, the order of keys and the form of numbers (``1.0`` or ``1``,
``1e-05`` or ``0.00001``) may be another tool's. Whoever changes a figure on purpose can compute the digest again: it
is no signature. Our choice; that numbers count as doubles is from RFC 8785 (JSON Canonicalization), section 3.2.2.3.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mpq_deploy.run.folder import SEAL, canonical_json

# Numbers as every JSON tool keeps them: IEEE doubles, in which integers are exact below this (RFC 8259, section 6).
_EXACT = 2**53


def report_json(values: dict[str, Any]) -> str:
    """Return report.json: sorted keys, finite numbers, and the digest of all values beside them (``SEAL``).

    Raises ValueError for NaN and infinity.
    """
    return canonical_json({**values, SEAL: values_digest(canonical_json(values))})


def values_digest(text: str) -> str:
    """SHA-256 of the values of a JSON object but for ``SEAL``, in one form for equal values.

    Raises ValueError for NaN, infinity and what is no JSON object, RecursionError for values nested too deeply.
    """
    values = json.loads(text, parse_int=_number, parse_float=_number)
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}")
    values.pop(SEAL, None)
    plain = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(plain.encode()).hexdigest()


def _number(text: str) -> float | int:
    # The shortest text that gives a double back is one per double; -0.0 becomes 0.0, as JavaScript writes it.
    value = float(text) + 0.0
    return value if abs(value) < _EXACT or not text.lstrip("-").isdigit() else int(text)
