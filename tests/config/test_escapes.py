"""Promise: what is typed for a setting that is compared with text has its usual escapes, or is an error; else text is literal."""

from pathlib import Path

import pytest

from mtp_dist.config.compose import changed, compose, load, save
from mtp_dist.config.escapes import unescaped, unescaped_list
from mtp_dist.config.schema import Generation, ShardBuild
from mtp_dist.errors import UserError


@pytest.mark.parametrize(
    ("typed", "texts"),
    [
        (r"[\n\n]", ["\n\n"]),
        (r"['\n', \t, \r, \\n, \\\\]", ["\n", "\t", "\r", "\\n", "\\\\"]),
        (r'["}, {", a\"b, "\"", ' + r"'it\'s', it's]", ["}, {", 'a"b', '"', "it's", "it's"]),
        (r"[\u3002, \U0001F600, é]", ["。", "😀", "é"]),
        ("[x jum, def ,  class x]", ["x jum", "def", "class x"]),
        ("[' a ']", [" a "]),
        ("[1, 2.0, null, true, ${x}]", ["1", "2.0", "null", "true", "${x}"]),
        ("[']']", ["]"]),
        ("['']", [""]),
        ("[]", []),
    ],
)
def test_lists(typed: str, texts: list[str], tmp_path: Path) -> None:
    assert unescaped_list("decode.stop", typed) == texts
    config = compose("generate", Generation, [f"decode.stop={typed}"])
    assert config.decode.stop == texts
    assert changed(Generation(), [f"decode.stop={typed}"], "here").decode.stop == texts
    # A file says it once: nothing is unescaped twice.
    save(config, tmp_path / "saved.yaml")
    assert load(tmp_path / "saved.yaml", Generation).decode.stop == texts


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("END", "takes a list of texts"),
        ("null", "takes a list of texts"),
        ("", "takes a list of texts"),
        (r"[\d]", r"\d is no escape"),
        (r"['\]", "cannot be read"),
        (r"[\x41]", r"\x is no escape"),
        (r"[\u12]", r"\u is no escape"),
        (r"[\ud83d\ude00]", r"\ud83d is no character"),
        (r"[\U00110000]", "is no character"),
        ("[a,,b]", "cannot be read"),
        ("[a,]", "cannot be read"),
        ("['a' b]", "cannot be read"),
        ("[a]b]", "cannot be read"),
        ("['a]", "cannot be read"),
    ],
)
def test_what_is_no_list_of_texts_is_an_error(typed: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        compose("generate", Generation, [f"decode.stop={typed}"])
    assert says in str(caught.value)
    assert str(caught.value).startswith("decode.stop=")


@pytest.mark.parametrize(
    ("typed", "text"),
    [(r"\n--\t\n", "\n--\t\n"), ("'END'", "END"), (r"'\\n'", "\\n"), ("\n", "\n"), (r"a, ${b}: [\"]", 'a, ${b}: ["]')],
)
def test_a_separator(typed: str, text: str) -> None:
    assert (
        compose("build_shards", ShardBuild, [f"separator={typed}"]).separator == text == unescaped("separator", typed.strip("'"))
    )


@pytest.mark.parametrize("typed", ["\\", r"a\ b", r"\8"])
def test_a_separator_with_another_backslash_is_an_error(typed: str) -> None:
    with pytest.raises(UserError, match="is no escape"):
        compose("build_shards", ShardBuild, [f"separator={typed}"])


def test_a_prompt_is_literal() -> None:
    assert compose("generate", Generation, [r"prompt=print('\n')"]).prompt == r"print('\n')"


@pytest.mark.parametrize("key", ["prompt", "checkpoint", "output", "decode.draft_model", "decode.stop"])
def test_bytes_that_are_no_utf8_are_named_for_every_setting(key: str) -> None:
    typed = b"ab\xff".decode(errors="surrogateescape")
    with pytest.raises(UserError, match=rf"{key}=ab\\xff is not UTF-8"):
        compose("generate", Generation, [f"{key}={typed}"])
    with pytest.raises(UserError, match="is not UTF-8"):
        changed(Generation(), [f"{key}={typed}"], "here")
