"""Decodes small text files that people edit: UTF-8 with or without a byte order mark, and UTF-16."""

from __future__ import annotations

import codecs

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode(content: bytes) -> str:
    """Return the text of a file. Editors and PowerShell on Windows write byte order marks, and UTF-16.

    Raises:
        UnicodeDecodeError: the content is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    return content.decode("utf-16" if content.startswith(_UTF16) else "utf-8-sig")


def is_utf16(content: bytes) -> bool:
    """Return whether a file is UTF-16, with or without a byte order mark."""
    return content.startswith(_UTF16) or b"\0" in content[:2]
