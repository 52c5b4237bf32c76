"""Datasets of the Hugging Face hub, and folders of datasets, read as a stream.

The source is ``hf://OWNER/NAME``, with ``?name=CONFIG&split=SPLIT`` where needed. Nothing is
downloaded as a whole. A folder is named as ``hf://./FOLDER``.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qsl

from gpt.config import UsageError, foreign, quoted
from gpt.data.compression import Tap, extra
from gpt.data.formats import Document, cut
from gpt.data.reading import Reading
from gpt.files import as_training_text

PREFIX = "hf://"
OPTIONS = ("name", "split", "revision")


def opened(source: str, reading: Reading) -> Callable[[Path, Tap], Iterator[Document]]:
    """The function that reads the dataset's documents. Its tap is told of the text of each.

    ``UsageError`` if the package datasets is missing or the source names an unknown option.
    """
    name, _, query = source.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise UsageError(
            f"the dataset {quoted(source)} has the option {unknown[0]!r}, and takes "
            f"{', '.join(OPTIONS)}"
        )
    if not name:
        raise UsageError(
            f"the dataset {quoted(source)} has no name, and must be like {PREFIX}OWNER/NAME"
        )
    datasets = extra("datasets", f"the dataset {quoted(source)}", "datasets")
    split = options.pop("split", "train")

    def documents(path: Path, tap: Tap) -> Iterator[Document]:
        number, field = 0, reading.text_field
        try:
            for row in datasets.load_dataset(name, split=split, streaming=True, **options):
                number += 1
                if not isinstance(text := row.get(field), str | None):
                    text = None
                if field not in row or (text is None and row[field] is not None):
                    raise UsageError(
                        f"row {number:,} of the dataset {quoted(source)} has no text "
                        f"{quoted(field)}; its fields are {foreign(', '.join(row))}: "
                        "set data.text_field to one of them"
                    )
                if text:
                    tap(text.encode(errors="surrogatepass"))
                    yield cut(as_training_text(text))
        except UsageError:
            raise
        except Exception as error:  # datasets has no exception of its own for what fails in it
            raise UsageError(
                f"the dataset {quoted(source)} cannot be read after row {number:,}: "
                f"{foreign(error)}"
            ) from None

    return documents
