"""``python -m mtp_dist.generate checkpoint=... interactive=true``: a text that a person and the model write in turns.

No chat: a model of this project continues text, it was never taught to answer. What is shown is what is continued: each line goes
behind the text so far, and what the model writes goes behind the line. Works from a pipe as well, without prompts.
"""

import codecs
import io
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from mtp_dist.config.rules import whole_text
from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding.request import validate_decoding
from mtp_dist.errors import UserError

if TYPE_CHECKING:
    from mtp_dist.generate import Writer

HELP = """A line goes behind the text so far, and the model goes on from there. It continues text; it does not chat.
  an empty line      go on
  a line ending in \\  a line break, and another line
  /reset             forget the text
  /text              show the text so far
  /temperature T     0: greedy
  /length N          tokens written at most
  /help   /quit      also Ctrl-D; Ctrl-C ends what is being written"""
PROMPT = "> "


class Sheet:
    """The text so far, and how it goes on. ``longest``: tokens that the model was trained on."""

    def __init__(self, writer: "Writer", longest: int) -> None:
        self.writer, self.decode, self.longest = writer, writer.decode, longest
        self.text, self.turns, self.warned = "", 0, False

    def go_on(self, line: str) -> None:
        """Put the line behind the text, show it and what the model adds."""
        if not self.text + line:
            _note("the text is empty; type its beginning, or /help")
            return
        tokens = self.writer.encoder.encode(self.text + line, "the text")
        if not self.warned and len(tokens) + self.decode.max_new_tokens > self.longest:
            _note(f"the text passes {self.longest} tokens, what the model was trained on; /reset begins another")
            self.warned = True
        self.text += line
        before = len(self.text)
        print(line, end="", flush=True)
        ending = self._write(tokens)
        print(flush=True)
        if len(self.text) > before and not (added := self.text[before:]).strip():
            _note(f"white space alone: {len(added)} characters")
        if ending == "end_of_document":
            _note("the document has ended; the next line begins another")
            self.reset()

    def _write(self, tokens: list[int]) -> str:
        """Why it stopped. What was shown is part of the text, however it stopped."""
        from mtp_dist.decoding.stopping import TextStream

        stream, ending = TextStream(self.writer.tokenizer, self.writer.stops, tokens), ""
        self.turns += 1
        try:
            for new, reason in self.writer.follow(tokens, self.decode, self.turns):
                ending = reason
                self._show(stream.feed(new))
            self._show(stream.held)  # not half a character, should the text end inside of one
        except KeyboardInterrupt:
            ending = "interrupted"
        return ending

    def _show(self, text: str) -> None:
        self.text += text
        print(text, end="", flush=True)

    def reset(self) -> None:
        """Forget the text."""
        self.text, self.warned = "", False

    def change(self, key: str, value: str) -> None:
        """Decode otherwise from now on. Raises UserError."""
        kind = float if key == "temperature" else int
        try:
            changed: DecodeConfig = replace(self.decode, **{key: kind(value)})  # type: ignore[arg-type]
        except ValueError:
            raise UserError(f"{value or 'nothing'} is no {'number' if kind is float else 'whole number'}") from None
        validate_decoding(changed)
        self.decode = changed
        _note(f"{key} {getattr(changed, key)}")


def converse(writer: "Writer", longest: int, beginning: str) -> int:
    """Until the input ends. ``beginning``: a first line, or empty."""
    if sys.stdin is None:
        raise UserError("interactive=true reads lines from the standard input, which is closed; open it, or give a prompt")
    sheet, terminal = Sheet(writer, longest), sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A byte that is no text spoils its line, not the lines that were read with it. ASCII is UTF-8, too.
        encoding = codecs.lookup(sys.stdin.encoding).name
        sys.stdin.reconfigure(encoding="utf-8" if encoding == "ascii" else encoding, errors="surrogateescape")
    if terminal:
        import readline  # noqa: F401 - input() then has line editing

        _note("the model continues your text, it does not chat; /help says more")
    if beginning:
        sheet.go_on(beginning)
    while True:
        try:
            if not _obey(sheet, _line(PROMPT if terminal else "")):
                return 0
        except EOFError:
            return 0
        except KeyboardInterrupt:
            _note("Ctrl-D or /quit leaves")
        except UserError as error:
            _note(str(error))


def _line(prompt: str) -> str:
    """A line, or several where each but the last ends in a backslash."""
    parts = [input(prompt)]
    while parts[-1].endswith("\\"):
        parts[-1] = parts[-1][:-1]
        parts.append(input(prompt))
    line = "\n".join(parts)
    whole_text("the line", line)
    return line


def _obey(sheet: Sheet, line: str) -> bool:
    """Do what a line says; False for the last one."""
    command, _, value = line.partition(" ")
    match command:
        case "/quit":
            return False
        case "/help":
            print(HELP, file=sys.stderr)
        case "/reset":
            sheet.reset()
        case "/text":
            print(sheet.text)
        case "/temperature":
            sheet.change("temperature", value.strip())
        case "/length":
            sheet.change("max_new_tokens", value.strip())
        case _ if line.startswith("/"):
            raise UserError(f"{command} is no command; /help lists them (a space before the slash makes it text)")
        case _:
            sheet.go_on(line)
    return True


def _note(text: str) -> None:
    """Not part of the text."""
    print(f"[{text}]", file=sys.stderr, flush=True)
