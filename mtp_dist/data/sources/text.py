"""Plain UTF-8 text files: one document a file, or several divided by a separator."""

from collections.abc import Iterator, Sequence

from mtp_dist.data.sources.files import find_files, total_size
from mtp_dist.data.sources.source import Document
from mtp_dist.errors import UserError


class TextFiles:
    """Each file is a document; with a separator each piece between two, named file#number."""

    def __init__(self, inputs: Sequence[str], separator: str) -> None:
        self._files = find_files(inputs, "text")
        self._separator = separator

    def size(self) -> int:
        return total_size(self._files)

    def __iter__(self) -> Iterator[Document]:
        for file in self._files:
            try:
                # Bytes, not text mode: line ends stay what they are.
                content = file.path.read_bytes().decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{file.path} is not UTF-8 (byte {error.start}); convert it or leave it out of input") from error
            if self._separator:
                for number, piece in enumerate(content.split(self._separator)):
                    yield Document(f"{file.name}#{number}", piece)
            else:
                yield Document(file.name, content)
