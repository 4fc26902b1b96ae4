"""Promise: docs/configuration.md says what the schemas and conf/ say."""

from pathlib import Path

from mtp_dist.config.compose import settings
from mtp_dist.config.documentation import ROOTS, is_current, markdown
from mtp_dist.config.folder import conf_folder, groups


def test_the_page_of_settings_is_current() -> None:
    assert is_current(conf_folder().parent / "docs" / "configuration.md"), "run python -m mtp_dist.config.documentation"


def test_a_stale_or_missing_page_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "configuration.md"
    assert not is_current(page)
    page.write_text(markdown().replace("model.layers", "model.levels"), encoding="utf-8")
    assert not is_current(page)


def test_the_page_names_every_setting_and_every_option() -> None:
    text = markdown()
    for cls in ROOTS.values():
        for key in settings(cls):
            assert f"| `{key}` |" in text
    for group, options in groups().items():
        for option in options:
            assert f"| `{group}={option}` |" in text
