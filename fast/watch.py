"""Watch a model read a file: a page to step through, chunk by chunk.

The page is `watch.html`, with what a `Recorder` saw put into it: one document that needs nothing
else, whether it is served or written to a file. What it shows comes from a text that nobody vouches
for, so the text goes in as JSON without a `<`, and the page lays it out as text alone.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .inputs import check_count
from .model import CoMeTModel
from .recorder import RecordedRound, Recorder
from .rows import KINDS
from .state import CoMeTState
from .tasks.passkey import encode

__all__ = [
    "COMMAND",
    "HIGHLIGHT",
    "HOST",
    "Chunk",
    "PageServer",
    "characters",
    "join",
    "page",
    "read",
    "watch",
]

COMMAND = """Let a model read a file, and show how, chunk by chunk: the text, the row, the queue,
the gate of each slot in each layer, and where attention goes. The page is served to this machine
alone, or written to a file."""
"""What the command's help says."""

HIGHLIGHT = r"The pass key is \d+"
"""What the page highlights, unless it is told otherwise: the key of the published task."""

HOST = "127.0.0.1"
"""The page is served to this machine alone."""


@dataclass(frozen=True)
class Chunk:
    """What was recorded of one chunk of one stream. The first axis of a layer's numbers is the
    layer, bottom first.
    """

    kinds: np.ndarray
    """[l] what each slot of the row is, a number in `rows.KINDS`."""

    ages: np.ndarray
    """[q] as `RecordedRound.ages`, after the chunk; all are known."""

    gate: np.ndarray
    """[layers, m] share of S that each slot keeps, the mean over channels of a vector gate. No
    layers while the chunk is open."""

    moved: np.ndarray
    """[layers, m] as `RecordedRound.moved`; no layers while the chunk is open."""

    attention: np.ndarray
    """[layers, w, 4] attention of each text token on the first four of `rows.KINDS`, the mean over
    heads."""


def join(before: Chunk | None, recorded: RecordedRound) -> Chunk:
    """A chunk with one round more.

    Args:
        before: its rounds before; None is none.
        recorded: a round of one stream.
    """
    kinds, take = recorded.kinds[0], int(recorded.take[0])
    attention = np.stack([x[0, :, :take].mean(axis=0) for x in recorded.attention])
    if before is not None:
        attention = np.concatenate([before.attention, attention], axis=1)
    none: list[np.ndarray] = []
    closed = bool(recorded.closes[0])
    return Chunk(
        kinds=kinds[kinds >= 0],
        ages=recorded.ages[0],
        gate=np.array([x[0].mean(axis=-1) for x in recorded.gate] if closed else none),
        moved=np.array([x[0] for x in recorded.moved] if closed else none),
        attention=attention,
    )


def read(model: CoMeTModel, text: bytes, answer: int) -> tuple[list[Chunk], bytes]:
    """Read a text, and let the model continue it, under a recorder.

    Args:
        model: byte-level.
        text: one byte at least.
        answer: bytes that the model may add, up to a line break; 0 is none.

    Returns:
        The chunks, those of the answer included; and the answer.
    """
    chunks: list[Chunk] = []
    recorder, said = Recorder(), b""
    state: CoMeTState | None = None
    ids, size = (
        torch.from_numpy(encode(text))[None].to(model.device),
        model.config.memory.chunk_size,
    )
    for start in range(0, len(text), size):
        piece = ids[:, start : start + size]
        if start + size < len(text):
            with torch.no_grad():
                state = model(piece, state=state, logits="none", recorder=recorder).state
        else:
            said = bytes(
                model.generate(piece, state, answer, stop_ids=(10,), recorder=recorder).ids[0]
            )
        for recorded in recorder.rounds:
            if recorded.chunk[0] == len(chunks):
                chunks.append(join(None, recorded))
            else:
                chunks[-1] = join(chunks[-1], recorded)
        recorder.rounds.clear()  # attention by head is large
    return chunks, said


def characters(data: bytes) -> list[str]:
    r"""Text to show, one string a byte: a character stands at its first byte, "" at its others.

    Bytes that are not UTF-8 are written out (``\xff``), and so are characters that would not show
    or would change what is around them (``\u202e``); line breaks and tabs stay.
    """
    shown = []
    for character in data.decode("utf-8", "surrogateescape"):
        raw = character.encode("utf-8", "surrogateescape")
        if not (character.isprintable() or character in "\n\t"):
            character = rf"\x{raw[0]:02x}" if len(raw) == 1 else rf"\u{ord(character):04x}"
        shown += [character, *[""] * (len(raw) - 1)]
    return shown


def page(content: dict[str, Any]) -> str:
    """The document.

    Args:
        content: what `watch.html` shows, as its script expects it.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    data = json.dumps(content, separators=(",", ":"), allow_nan=False)
    template = Path(__file__).with_name("watch.html").read_text(encoding="utf-8")
    return template.replace("{{content}}", data.replace("<", "\\u003c"))


def watch(
    model: CoMeTModel,
    file: Path,
    *,
    chunks: int = 300,
    answer: int = 8,
    highlight: str = HIGHLIGHT,
) -> str:
    """Read a file and tell what was seen, as one HTML document.

    Args:
        model: byte-level, vocabulary 256.
        file: the text.
        chunks: of it to read at most; memory and the document grow with them.
        answer: bytes that the model may add to a text that is read to its end; 0 is none.
        highlight: regular expression of what to highlight in the text's bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is empty, the model is not byte-level, or an argument does not fit.
    """
    check_count("chunks", chunks, 1)
    check_count("answer", answer, 0)
    memory, backbone = model.config.memory, model.config.backbone
    if backbone.vocab_size != 256:
        raise ValueError(
            f"the model has a vocabulary of {backbone.vocab_size}; a byte-level one has 256."
        )
    try:
        pattern = re.compile(highlight.encode())
    except re.error as error:
        raise ValueError(f"{highlight!r} is no regular expression: {error}.") from error
    limit = chunks * memory.chunk_size
    with file.open("rb") as opened:
        text = opened.read(limit + 1)
    if not text:
        raise ValueError(f"{file} is empty; give a text.")
    is_cut, text = len(text) > limit, text[:limit]
    recorded, said = read(model, text, 0 if is_cut else answer)
    shown, at = characters(text) + characters(said), 0
    parts = []
    for chunk in recorded:
        size = chunk.attention.shape[1]
        parts.append({"text": shown[at : at + size], **_numbers(chunk)})
        at += size
    return page(
        {
            "name": file.name,
            "bytes": len(text),
            "isCut": is_cut,
            "spans": [match.span() for match in pattern.finditer(text)],
            "chunkSize": memory.chunk_size,
            "globalSlots": memory.global_memory_size,
            "queueSize": memory.temporary_memory_size,
            "kinds": KINDS,
            "chunks": parts,
        }
    )


def _numbers(chunk: Chunk) -> dict[str, Any]:
    """A chunk as JSON takes it: attention is the mean over its text tokens, and `looks`, for each
    of these, the mean over layers of what it gives to the global memory.
    """
    return {
        "kinds": chunk.kinds.tolist(),
        "ages": chunk.ages.tolist(),
        "gate": _short(chunk.gate, 9),  # nearly shut is not shut, in float32 either
        "moved": _short(chunk.moved),
        "attention": _short(chunk.attention.mean(axis=1)),
        "looks": _short(chunk.attention[:, :, KINDS.index("global")].mean(axis=0)),
    }


def _short(x: np.ndarray, digits: int = 4) -> Any:
    """Lists of numbers with so many digits that count."""
    return [_short(part, digits) for part in x] if x.ndim else float(f"{x:.{digits}g}")


class PageServer(ThreadingHTTPServer):
    """Serves one document to this machine.

    Args:
        port: to listen on; 0 is any free one, see `server_port`.

    Raises:
        ValueError: there is no such port, or it cannot be had.
    """

    def __init__(self, port: int) -> None:
        self.document = b""
        """What it serves."""
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no such port"
            raise ValueError(
                f"port {port} of {HOST} cannot be had ({reason}); choose another with --port."
            ) from error


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        # A name that a stranger points at this machine must not read the text.
        if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
            self.send_error(403)
        elif self.path != "/":
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(self.server.document)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(self.server.document)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""
