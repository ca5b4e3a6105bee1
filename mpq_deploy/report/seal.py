"""The digest in report.json, which reveals changed figures.

It covers the values, not the text: indentation, order of keys and the form of numbers may be
another tool's. It is no signature: whoever changes a figure on purpose can compute it again. Our
choice; numbers count as doubles as in RFC 8785, section 3.2.2.3.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mpq_deploy.system.files import SEAL, canonical_json

# JSON numbers are IEEE doubles, in which integers are exact below this (RFC 8259, section 6).
_EXACT = 2**53


def report_json(values: dict[str, Any]) -> str:
    """Return report.json: sorted keys, finite numbers, and the digest of all values (``SEAL``).

    Raises ValueError for NaN and infinity.
    """
    return canonical_json({**values, SEAL: values_digest(canonical_json(values))})


def values_digest(text: str) -> str:
    """SHA-256 of a JSON object's values without ``SEAL``; equal values give equal digests.

    Raises ValueError for NaN, infinity and anything but a JSON object, RecursionError for values
    nested too deeply.
    """
    values = json.loads(text, parse_int=_number, parse_float=_number)
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}")
    values.pop(SEAL, None)
    plain = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(plain.encode()).hexdigest()


def _number(text: str) -> float | int:
    # The shortest text of a double is unique; -0.0 becomes 0.0, as JavaScript writes it.
    value = float(text) + 0.0
    return value if abs(value) < _EXACT or not text.lstrip("-").isdigit() else int(text)
