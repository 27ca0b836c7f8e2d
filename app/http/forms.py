"""Reads multipart forms piece by piece (RFC 7578), as common clients send them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.problems import BodyTooLarge, InvalidParameter, MalformedMultipart, MissingFile, TooManyFiles

if TYPE_CHECKING:  # The package defines this name for type checkers only.
    from python_multipart.multipart import MultipartCallbacks

_PARAMETER = re.compile(rb';[ \t]*+([^\s;="]++)[ \t]*+=[ \t]*+("(?:\\.|[^\\])*?"[ \t]*+|[^;"]*+)(?=;|\Z)')
"""Name and value; the value may have blanks at its end."""
_IDENTITY_ENCODINGS = frozenset((b"", b"binary", b"8bit", b"7bit"))
_FILE_TYPES = (b"image/", b"application/octet-stream")
_LONGEST_TYPE = 1024
_LONGEST_BOUNDARY = 200
_LONGEST_PADDING = 16
_LONGEST_FIELD = 1024
_MOST_HEADERS = 16
_MOST_FIELDS = 16


def boundary_of(content_type: str) -> bytes:
    """Return the boundary of a form, or raise `MalformedMultipart`."""
    if len(content_type) > _LONGEST_TYPE:
        raise MalformedMultipart(f"the header Content-Type has more than {_LONGEST_TYPE} characters")
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        hint = "Let the HTTP library set Content-Type for forms, because only the library knows the boundary."
        raise MalformedMultipart("the header Content-Type has no boundary", hint=hint)
    if len(boundary) > _LONGEST_BOUNDARY:
        raise MalformedMultipart(f"the boundary has more than {_LONGEST_BOUNDARY} bytes")
    return boundary


@dataclass(slots=True)
class Part:
    """One part of a form.

    Attributes:
        name: of its field.
        is_file: whether it is a file, and not a parameter.
        largest: maximum number of bytes of its content.
        content: the content up to that maximum.
        size: number of bytes that the form has for this part.
    """

    name: str
    is_file: bool
    largest: int
    content: bytearray
    size: int = 0

    @property
    def shown(self) -> str:
        """The name of the field, for messages."""
        return f"`{self.name[:40]}`"

    def text(self) -> str:
        """Return the content as a parameter's value, or raise `InvalidParameter`."""
        if self.size > _LONGEST_FIELD:
            raise InvalidParameter(f"the field {self.shown} has more than {_LONGEST_FIELD} bytes")
        try:
            return self.content.decode()
        except UnicodeDecodeError:
            raise InvalidParameter(f"the field {self.shown} is not UTF-8") from None


class FormReader:
    """Reads the parts of a form piece by piece. The result does not depend on where the pieces begin.

    Args:
        boundary: from the header Content-Type.
        field: name of the field of files.
        fields: names of the parameters that are read.
        largest: maximum number of bytes of a part.
        most: maximum number of parts; of a stream, maximum number of files.
        streamed: whether files are processed while later parts arrive. Then no parameter may follow a file.
    """

    def __init__(
        self,
        boundary: bytes,
        field: str,
        *,
        fields: frozenset[str],
        largest: int,
        most: int,
        streamed: bool = False,
    ) -> None:
        self._parts = _Parts(field, fields, largest, most, streamed)
        # The parser does not skip a preamble (RFC 2046, 5.1.1): it gets the body from the first delimiter on.
        # A delimiter may also be at the start of the body, so a CRLF is added there.
        self._preamble: bytes | None = b"\r\n"
        self._opening = b"--" + boundary + b"\r\n"
        delimiter = b"\r\n--" + re.escape(boundary)
        self._delimiter = re.compile(delimiter + rb"(?:[ \t]{0,%d}\r\n|(--))" % _LONGEST_PADDING)
        self._longest = len(boundary) + _LONGEST_PADDING + 6
        self._parser = MultipartParser(boundary, self._parts.callbacks(), max_header_count=_MOST_HEADERS)

    @property
    def file_begun(self) -> bool:
        """Whether the first file has begun."""
        return self._parts.file_begun

    def feed(self, data: bytes) -> None:
        """Read the next piece of the body."""
        if self._parts.ended:  # An epilogue follows.
            return
        if self._preamble is not None:
            data = self._without_preamble(self._preamble + data)
        try:
            self._parser.write(data)
        except MultipartParseError:
            raise MalformedMultipart("the parts of the form do not have the format of RFC 7578") from None

    def taken(self) -> list[Part]:
        """Return the complete parts that have not been returned before."""
        parts, self._parts.complete = self._parts.complete, []
        return parts

    def finish(self) -> None:
        """Check that the form is complete."""
        if self._preamble is not None:
            raise MalformedMultipart("the boundary of the header Content-Type does not occur in the body")
        if not self._parts.ended:
            raise MalformedMultipart("the form ends before its closing boundary")

    def _without_preamble(self, data: bytes) -> bytes:
        found = self._delimiter.search(data)
        if found is None:
            self._preamble = data[-self._longest :]
            return b""
        self._preamble = None
        if found[1]:
            self._parts.ended = True
            return b""
        return self._opening + data[found.end() :]


class _Parts:
    """The callbacks of the parser, without a reference to it: a cycle would keep the content of each form for long.

    Attributes:
        complete: parts that have ended and were not taken.
        file_begun: whether the first file has begun.
        ended: whether the closing boundary has been read.
    """

    def __init__(self, field: str, fields: frozenset[str], largest: int, most: int, streamed: bool) -> None:
        self.complete: list[Part] = []
        self.file_begun = False
        self.ended = False
        self._field = field
        self._fields = fields
        self._largest = largest
        self._most = most
        self._streamed = streamed
        self._count = 0
        self._part = Part("", True, largest, bytearray())
        self._headers: dict[bytes, bytes] = {}
        self._header, self._value = bytearray(), bytearray()

    def callbacks(self) -> MultipartCallbacks:
        """Return the methods by the names of the parser's events."""
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def _on_part_begin(self) -> None:
        self._count += 1
        if self._count > self._most and not self._streamed:
            raise TooManyFiles(f"the form has more than {self._most} parts")
        self._headers = {}

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        name = bytes(self._header).lower()
        if name in self._headers or b"\n" in self._value or b"\0" in self._value:
            raise MalformedMultipart("a part has a header twice, or a header with control characters")
        self._headers[name] = bytes(self._value).strip(b" \t")
        self._header, self._value = bytearray(), bytearray()

    def _on_headers_finished(self) -> None:
        name, has_file_name = _disposition(self._headers.get(b"content-disposition", b""))
        encoding = self._headers.get(b"content-transfer-encoding", b"").lower()
        typed = self._headers.get(b"content-type", b"").lower().startswith(_FILE_TYPES)
        part = Part(name, has_file_name or typed or name == self._field, self._largest, bytearray())
        if encoding not in _IDENTITY_ENCODINGS:
            raise MalformedMultipart(
                f"the part {part.shown} has the Content-Transfer-Encoding {encoding[:40].decode('latin-1')}",
                hint="Send the bytes of the part as they are: RFC 7578 does not allow other transfer encodings.",
            )
        if not part.is_file and name not in self._fields and name != "_charset_":
            known = ", ".join((self._field, *sorted(self._fields)))
            hint = "Send other parameters of the route in the query."
            raise InvalidParameter(f"the form has the field {part.shown}; the route reads {known}", hint=hint)
        if self._streamed:
            self._check_order(part)
        self.file_begun = self.file_begun or part.is_file
        self._part = part

    def _check_order(self, part: Part) -> None:
        if part.is_file and part.name != self._field:
            raise MissingFile(f"the form has a file in the field {part.shown}, not in `{self._field}`")
        if part.is_file and not self.file_begun:
            self._count = 1  # from here on only files are left
        elif not part.is_file and self.file_begun and part.name != "_charset_":
            raise InvalidParameter(
                f"the form has the field {part.shown} after a file",
                hint="Put the parameters of the form before its first file, or send them in the query.",
            )
        if part.is_file or self.file_begun:
            if self._count > self._most:
                raise BodyTooLarge(f"the form has more than {self._most} files; send the others in further requests")
        elif self._count > _MOST_FIELDS:
            raise InvalidParameter(f"the form has more than {_MOST_FIELDS} fields before its first file")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        part.size += end - start
        if part.size <= part.largest:
            part.content += data[start:end]
        else:
            part.content.clear()  # the result must not depend on the split into packets

    def _on_part_end(self) -> None:
        if self._part.is_file or self._part.name != "_charset_":  # RFC 7578, 4.6: UTF-8 is the only one left.
            self.complete.append(self._part)

    def _on_end(self) -> None:
        self.ended = True


def _disposition(value: bytes) -> tuple[str, bool]:
    """Return the field name of a part, and whether it has a file name, in either form: `filename` or `filename*`."""
    kind, at = value.partition(b";")[0], 0
    parameters: dict[bytes, bytes] = {}
    at = len(kind)
    while found := _PARAMETER.match(value, at):
        name = found[1].lower()
        if name in parameters:
            raise MalformedMultipart("a part has a parameter twice in Content-Disposition")
        parameters[name] = found[2].rstrip(b" \t")
        at = found.end()
    if kind.strip().lower() != b"form-data" or b"name" not in parameters or value[at:].strip(b"; \t"):
        raise MalformedMultipart("a part has no header `Content-Disposition: form-data` with a name")
    name = parameters[b"name"]
    if name.startswith(b'"'):
        name = re.sub(rb"\\(.)", rb"\1", name[1:-1])
    return name.decode("utf-8", "replace"), b"filename" in parameters or b"filename*" in parameters
